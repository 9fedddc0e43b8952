// CUB's DeviceTopK as a baseline for bench_topk_mask.py; no part of the package.
//
// Source: CCCL (github.com/NVIDIA/cccl), headers of the PyPI package nvidia-cuda-cccl, which has
// DeviceTopK from CCCL 3.3 on; the CUB of CUDA 13.0 does not. It takes one tensor, reads it about
// twice, gives its indices in no order, and any of equal scores: determinism is not on offer.
// Built by cub_topk.py.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cub/device/device_topk.cuh>
#include <cuda/iterator>

namespace {

template <typename Score>
cudaError_t top_k(void* workspace, size_t& workspace_bytes, const void* scores, void* values,
                  int64_t* indices, int64_t num_scores, int64_t k, cudaStream_t stream) {
  const auto requirements = cuda::execution::require(
      cuda::execution::determinism::not_guaranteed, cuda::execution::output_ordering::unsorted);
  const auto environment = cuda::std::execution::env{cuda::stream_ref{stream}, requirements};
  // Indices are counted, not read: the strongest form of this baseline.
  return cub::DeviceTopK::MaxPairs(
      workspace, workspace_bytes, static_cast<const Score*>(scores), static_cast<Score*>(values),
      cuda::counting_iterator<int64_t>{0}, indices, num_scores, k, environment);
}

}  // namespace

// Selects the k largest of num_scores fp32 or bf16 scores.
//   workspace        null: only workspace_bytes is written
//   values, indices  [k] out, in no order
// Returns a cudaError_t.
extern "C" int fishfast_bench_cub_topk(int is_bfloat16, void* workspace, size_t* workspace_bytes,
                                       const void* scores, void* values, int64_t* indices,
                                       int64_t num_scores, int64_t k, void* stream) {
  auto select = is_bfloat16 ? top_k<__nv_bfloat16> : top_k<float>;
  return select(workspace, *workspace_bytes, scores, values, indices, num_scores, k,
                static_cast<cudaStream_t>(stream));
}
