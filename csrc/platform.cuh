// The one header between the kernels and the two machines they are compiled for: nvcc for the card,
// and plain g++ with -DFF_SIM against tests/simt, which executes the same source on a CPU.
//
// Everything machine-dependent is here (shared memory, launch, acquire/release), so that a kernel
// file is the same text for both. Kernels never write `__shared__`, `<<<` or `asm` themselves.
//
//   FF_SHARED(float, tile, [256]);          // __shared__ float tile[256];
//   FF_SHARED(unsigned, count);             // __shared__ unsigned count;
//   FF_DYN_SHARED(float, scratch);          // the launch's dynamic shared memory, as float*
//   FF_LAUNCH((scan<256, 8>), grid, block, shared_bytes, stream, arguments...);   // and check it
//
// A template kernel with a comma goes in parentheses, as above: the preprocessor splits at commas.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#ifdef FF_SIM

#include "simt.h"

// Each CUDA block gets its own heap array, so that AddressSanitizer puts red zones around it. The
// address of a static identifies the declaration: one array per declaration and block.
#define FF_SHARED(type, name, ...)        \
  static const char name##_identity = 0;  \
  using name##_shared = type __VA_ARGS__; \
  auto& name = simt::shared_array<name##_shared>(&name##_identity)

#define FF_DYN_SHARED(type, name) type* name = simt::dynamic_shared<type>()

#define FF_GRID_CONSTANT

// Throws simt::Error when the configuration is invalid or the run found a defect.
#define FF_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  simt::launch(kernel, grid, block, shared_bytes, stream, __VA_ARGS__)

#else

#include <cuda_runtime.h>

#define FF_SHARED(type, name, ...) __shared__ type name __VA_ARGS__

// 16 bytes, so that a float4 can be read from the start. The raw array has one name and one type in
// the whole file because all `extern __shared__` declarations are the same memory.
#define FF_DYN_SHARED(type, name)                                 \
  extern __shared__ __align__(16) unsigned char ff_dynamic_raw[]; \
  type* name = reinterpret_cast<type*>(ff_dynamic_raw)

// Before a large argument that threads index: it is read where the launch put it, not copied to
// every thread's stack.
#define FF_GRID_CONSTANT __grid_constant__

// A refused launch (too many threads, too much shared memory, no image for this card) is silent in
// CUDA and leaves the output as it was: so no launch can be written without its check.
#define FF_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)         \
  do {                                                                    \
    (kernel)<<<(grid), (block), (shared_bytes), (stream)>>>(__VA_ARGS__); \
    fishfast::check_launch(#kernel);                                      \
  } while (0)

#endif

namespace fishfast {

// Throws if the launch just made was refused, or if an earlier kernel of this thread's context
// failed (CUDA reports both in one place). Does not wait for the kernel.
inline void check_launch(const char* kernel_name) {
  const cudaError_t status = cudaGetLastError();
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string("CUDA error at the launch of ") + kernel_name + ": " +
                             cudaGetErrorString(status));
  }
}

inline void check_status(cudaError_t status) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // or the next launch would be blamed for it
  throw std::runtime_error(std::string("CUDA error: ") + cudaGetErrorString(status));
}

// What the card allows. Queries only: none of them waits for the device.
#ifdef FF_SIM

inline int64_t max_shared_bytes() { return 227 * 1024; }

// Few, so that each of them takes several turns.
template <class Kernel>
inline int64_t resident_blocks(Kernel, int, int64_t) {
  return 3;
}

#else

// Dynamic shared memory that one block may ask for.
inline int64_t max_shared_bytes() {
  int device = 0, bytes = 0;
  check_status(cudaGetDevice(&device));
  check_status(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return bytes;
}

// How many blocks run at the same time: the grid of a kernel whose blocks loop over their work.
// Also allows the kernel its dynamic shared memory, which is refused above 48 KB otherwise.
template <class Kernel>
inline int64_t resident_blocks(Kernel kernel, int threads, int64_t shared_bytes) {
  int device = 0, multiprocessors = 0, blocks = 0;
  check_status(cudaGetDevice(&device));
  check_status(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  check_status(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)));
  check_status(
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared_bytes));
  return int64_t(multiprocessors) * (blocks > 0 ? blocks : 1);
}

#endif

// Flags between blocks: what a thread wrote before st_release is visible to the thread whose
// ld_acquire read the flag. T is a 4- or 8-byte unsigned integer. A plain or volatile access gives
// no such order on the card, and is a data race for the CPU run's ThreadSanitizer.
#ifdef FF_SIM

// Both hand the CPU to another simulated thread, since a spinning thread would otherwise starve the
// one it waits for. The source line is remembered to name an endless spin.
template <class T>
inline T ld_acquire(const T* address, SIMT_HERE) {
  simt::spin(where);
  return __atomic_load_n(address, __ATOMIC_ACQUIRE);
}

template <class T>
inline void st_release(T* address, T value, SIMT_HERE) {
  __atomic_store_n(address, value, __ATOMIC_RELEASE);
  simt::released(where);
}

#else

template <class T>
__device__ __forceinline__ T ld_acquire(const T* address) {
  static_assert(T(-1) > T(0) && (sizeof(T) == 4 || sizeof(T) == 8), "uint32 or uint64 flags only");
  T value;
  if constexpr (sizeof(T) == 4) {
    asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  } else {
    asm volatile("ld.acquire.gpu.u64 %0, [%1];" : "=l"(value) : "l"(address) : "memory");
  }
  return value;
}

template <class T>
__device__ __forceinline__ void st_release(T* address, T value) {
  static_assert(T(-1) > T(0) && (sizeof(T) == 4 || sizeof(T) == 8), "uint32 or uint64 flags only");
  if constexpr (sizeof(T) == 4) {
    asm volatile("st.release.gpu.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
  } else {
    asm volatile("st.release.gpu.u64 [%0], %1;" ::"l"(address), "l"(value) : "memory");
  }
}

#endif

}  // namespace fishfast
