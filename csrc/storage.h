// Weights and scores as raw bits: fp32, bf16 or fp16 in memory, fp32 in registers.
//
// The conversions are integer code, so host, device and simulated kernels give the same bits and
// none of them needs the CUDA headers. Rounding is to nearest, ties to even, as in PyTorch.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define FF_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FF_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace fishfast {

enum class Storage : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

FF_HOST_DEVICE uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

FF_HOST_DEVICE float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

FF_HOST_DEVICE uint16_t float_to_bf16(float value) {
  const uint32_t bits = bits_of(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;  // NaN: rounding could carry it into inf
  return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

FF_HOST_DEVICE float fp16_to_float(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000u) << 16;
  const uint32_t magnitude = half & 0x7fffu;
  if (magnitude >= 0x7c00u) return float_of(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  if (magnitude >= 0x0400u) return float_of(sign | ((magnitude << 13) + 0x38000000u));
  // Subnormal: magnitude * 2^-24 is exact in fp32.
  return float_of(sign | bits_of(float(magnitude) * 5.9604644775390625e-8f));
}

FF_HOST_DEVICE uint16_t float_to_fp16(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000u);
  if (magnitude > 0x7f800000u) return uint16_t(sign | 0x7e00u);   // NaN
  if (magnitude >= 0x477ff000u) return uint16_t(sign | 0x7c00u);  // rounds past 65504
  if (magnitude >= 0x38800000u) {                                 // normal in fp16
    const uint32_t rounded = magnitude - 0x38000000u + 0x0fffu + ((magnitude >> 13) & 1u);
    return uint16_t(sign | (rounded >> 13));
  }
  if (magnitude < 0x33000000u) return sign;  // below half of the smallest subnormal
  // Subnormal: shift the 24-bit significand down to units of 2^-24, keeping what falls off.
  const uint32_t exponent = magnitude >> 23;
  const uint32_t significand = (magnitude & 0x7fffffu) | 0x800000u;
  const uint32_t shift = 126u - exponent;
  const uint32_t kept = significand >> shift;
  const uint32_t lost = significand & ((1u << shift) - 1u);
  const uint32_t half = 1u << (shift - 1u);
  const bool up = lost > half || (lost == half && (kept & 1u));
  return uint16_t(sign | (kept + (up ? 1u : 0u)));
}

// 16-bit numbers as elements of an array.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
FF_HOST_DEVICE float value_of(float value) { return value; }
FF_HOST_DEVICE float value_of(BFloat16 value) { return float_of(uint32_t(value.bits) << 16); }
FF_HOST_DEVICE float value_of(Float16 value) { return fp16_to_float(value.bits); }

FF_HOST_DEVICE void store_rounded(void* data, int64_t index, Storage storage, float value) {
  if (storage == Storage::kFloat32) {
    static_cast<float*>(data)[index] = value;
  } else {
    static_cast<uint16_t*>(data)[index] =
        storage == Storage::kBFloat16 ? float_to_bf16(value) : float_to_fp16(value);
  }
}

}  // namespace fishfast
