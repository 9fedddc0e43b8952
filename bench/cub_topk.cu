// CUB's DeviceTopK as a baseline for bench_topk_mask.py; no part of the package.
//
// Source: CCCL (github.com/NVIDIA/cccl), headers of the PyPI package nvidia-cuda-cccl; the CUB of
// CUDA 13.0 does not have it. It takes one tensor, reads it about twice, gives its indices in no
// order, and any of equal scores: neither determinism nor order is on offer. Built by cub_topk.py.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cub/device/device_topk.cuh>
#include <cuda/iterator>
#include <cuda/std/version>

namespace {

template <typename Score, typename Index>
cudaError_t top_k(void* workspace, size_t& workspace_bytes, const void* scores, void* values,
                  void* indices, int64_t num_scores, int64_t k, cudaStream_t stream) {
  const auto requirements = cuda::execution::require(cuda::execution::determinism::not_guaranteed,
                                                     cuda::execution::output_ordering::unsorted);
  const auto environment = cuda::std::execution::env{cuda::stream_ref{stream}, requirements};
  // The indices of the scores are counted, not read: the fastest form of this baseline.
  return cub::DeviceTopK::MaxPairs(workspace, workspace_bytes, static_cast<const Score*>(scores),
                                   static_cast<Score*>(values), cuda::counting_iterator<Index>{0},
                                   static_cast<Index*>(indices), static_cast<Index>(num_scores),
                                   static_cast<Index>(k), environment);
}

}  // namespace

// Selects the k largest of num_scores scores.
//   kind             0: fp32, 1: bf16 scores, with int32 indices; 2, 3: the same with int64
//   workspace        null: only workspace_bytes is written
//   values, indices  [k] out, in no order
// Returns a cudaError_t.
extern "C" int fishfast_bench_cub_topk(int kind, void* workspace, size_t* workspace_bytes,
                                       const void* scores, void* values, void* indices,
                                       int64_t num_scores, int64_t k, void* stream) {
  using Select = decltype(&top_k<float, int32_t>);
  constexpr Select kSelect[] = {top_k<float, int32_t>, top_k<__nv_bfloat16, int32_t>,
                                top_k<float, int64_t>, top_k<__nv_bfloat16, int64_t>};
  return kSelect[kind](workspace, *workspace_bytes, scores, values, indices, num_scores, k,
                       static_cast<cudaStream_t>(stream));
}

// CCCL's version as it writes it: 3005000 is 3.5.0.
extern "C" int fishfast_bench_cccl_version() { return CCCL_VERSION; }
