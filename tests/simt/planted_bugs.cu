// One small kernel for each defect that the runtime or a sanitizer must name. tests/test_simt.py
// runs them all; the comment of each says what is wrong.
#include <stdexcept>
#include <string>

#include "platform.cuh"
#include "samples.h"

namespace fishfast::simt_tests {

namespace {

constexpr unsigned kAllLanes = 0xffffffffu;

// --- named by the runtime ---

// Half of the block waits at one barrier, half at another.
__global__ void two_barriers(int* data) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    data[threadIdx.x] = 1;
    __syncthreads();
  }
}

// One thread returns before the barrier.
__global__ void return_before_barrier(int* data) {
  if (threadIdx.x == 7) return;
  __syncthreads();
  data[threadIdx.x] = 1;
}

// Lane 20 is not in the mask it passes.
__global__ void lane_outside_mask(int* data) {
  data[threadIdx.x] = __shfl_sync(~(1u << 20), data[threadIdx.x], 0);
}

// The block has 16 threads, the mask 32.
__global__ void lane_does_not_exist(int* data) {
  data[threadIdx.x] = __reduce_add_sync(kAllLanes, data[threadIdx.x]);
}

// Lane 0 has returned when the others name it.
__global__ void lane_has_returned(int* data) {
  if (threadIdx.x == 0) return;
  data[threadIdx.x] = __ballot_sync(kAllLanes, data[threadIdx.x]);
}

// The lanes of the mask read lane 31, which is not in it.
__global__ void shuffle_from_outside_mask(int* data) {
  if (threadIdx.x < 16) data[threadIdx.x] = __shfl_sync(0x0000ffffu, data[threadIdx.x], 31);
}

// All lanes are named, but half of them are in another collective.
__global__ void two_collectives(int* data) {
  if (threadIdx.x < 16) {
    data[threadIdx.x] = __ballot_sync(kAllLanes, 1);
  } else {
    data[threadIdx.x] = __reduce_add_sync(kAllLanes, 1u);
  }
}

// Lane 31 waits for the block, the other lanes wait for lane 31.
__global__ void warp_waits_for_block(int* data) {
  if (threadIdx.x == 31) {
    __syncthreads();
  } else {
    __syncwarp();
  }
  data[threadIdx.x] = 1;
}

// Nobody sets the flag. All threads take part, so that barriers open again and again.
__global__ void flag_never_set(int* data) {
  const unsigned* flag = reinterpret_cast<unsigned*>(data);
  while (!__syncthreads_or(threadIdx.x == 0 && ld_acquire(flag) != 0)) {
  }
}

// The lock is taken and never given back.
__global__ void lock_never_released(int* data) {
  while (atomicCAS(&data[0], 0, 1) != 0) {
  }
}

// --- named by AddressSanitizer and UBSan ---

// Thread 63 writes one element past the end of `first`; `second` is its neighbour on the card.
__global__ void shared_overrun(int* data) {
  FF_SHARED(int, first, [64]);
  FF_SHARED(int, second, [64]);
  second[threadIdx.x] = 2;
  first[threadIdx.x + (threadIdx.x == 63)] = 1;
  __syncthreads();
  data[threadIdx.x] = first[threadIdx.x ^ 1] + second[threadIdx.x];
}

// The launch asked for 64 elements of dynamic shared memory.
__global__ void dynamic_shared_overrun(int* data) {
  FF_DYN_SHARED(int, scratch);
  scratch[threadIdx.x + 1] = data[threadIdx.x];
  __syncthreads();
  data[threadIdx.x] = scratch[threadIdx.x];
}

// `<=` instead of `<`.
__global__ void global_overrun(int* data, int64_t n) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i <= n) data[i] += 1;
}

// A float4 at an address that is a multiple of 4, not of 16.
__global__ void misaligned_vector(int* data) {
  const float4 value = *reinterpret_cast<const float4*>(data + 1);
  data[0] = static_cast<int>(value.x + value.w);
}

// An index computed in int: row 70000 of 70000 columns.
__global__ void index_overflow(int* data, int64_t n) {
  const int columns = static_cast<int>(n) + 70000;
  data[0] = columns * columns > 0;
}

// --- named by ThreadSanitizer ---

// Every block increments without an atomic.
__global__ void global_race(int* data) {
  if (threadIdx.x == 0) data[0] = data[0] + 1;
}

// The atomic counter orders nothing: data[1] is handed over without a fence.
__global__ void handover_without_fence(int* data) {
  if (threadIdx.x != 0) return;
  if (blockIdx.x == 0) {
    data[1] = 42;
    atomicExch(&data[0], 1);
  } else {
    while (atomicAdd(&data[0], 0) == 0) {
    }
    data[2] = data[1];
  }
}

}  // namespace

void launch_planted_bug(const char* name, int* data, int64_t n) {
  const std::string bug = name;
  if (bug == "two_barriers") {
    FF_LAUNCH(two_barriers, 1, 64, 0, nullptr, data);
  } else if (bug == "return_before_barrier") {
    FF_LAUNCH(return_before_barrier, 1, 64, 0, nullptr, data);
  } else if (bug == "lane_outside_mask") {
    FF_LAUNCH(lane_outside_mask, 1, 32, 0, nullptr, data);
  } else if (bug == "lane_does_not_exist") {
    FF_LAUNCH(lane_does_not_exist, 1, 16, 0, nullptr, data);
  } else if (bug == "lane_has_returned") {
    FF_LAUNCH(lane_has_returned, 1, 32, 0, nullptr, data);
  } else if (bug == "shuffle_from_outside_mask") {
    FF_LAUNCH(shuffle_from_outside_mask, 1, 32, 0, nullptr, data);
  } else if (bug == "two_collectives") {
    FF_LAUNCH(two_collectives, 1, 32, 0, nullptr, data);
  } else if (bug == "warp_waits_for_block") {
    FF_LAUNCH(warp_waits_for_block, 1, 32, 0, nullptr, data);
  } else if (bug == "flag_never_set") {
    FF_LAUNCH(flag_never_set, 1, 64, 0, nullptr, data);
  } else if (bug == "lock_never_released") {
    FF_LAUNCH(lock_never_released, 2, 1, 0, nullptr, data);
  } else if (bug == "too_many_threads") {
    FF_LAUNCH(two_barriers, 1, 2048, 0, nullptr, data);
  } else if (bug == "shared_overrun") {
    FF_LAUNCH(shared_overrun, 1, 64, 0, nullptr, data);
  } else if (bug == "dynamic_shared_overrun") {
    FF_LAUNCH(dynamic_shared_overrun, 1, 64, 64 * sizeof(int), nullptr, data);
  } else if (bug == "global_overrun") {
    FF_LAUNCH(global_overrun, static_cast<unsigned>(n / 64 + 1), 64, 0, nullptr, data, n);
  } else if (bug == "misaligned_vector") {
    FF_LAUNCH(misaligned_vector, 1, 1, 0, nullptr, data);
  } else if (bug == "index_overflow") {
    FF_LAUNCH(index_overflow, 1, 1, 0, nullptr, data, n);
  } else if (bug == "global_race") {
    FF_LAUNCH(global_race, 4, 32, 0, nullptr, data);
  } else if (bug == "handover_without_fence") {
    FF_LAUNCH(handover_without_fence, 2, 32, 0, nullptr, data);
  } else {
    throw std::invalid_argument("no planted bug is called " + bug);
  }
}

}  // namespace fishfast::simt_tests
