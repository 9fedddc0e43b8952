// CUDA's atomics on 4- and 8-byte values, relaxed as on the card: they order nothing else, so
// ThreadSanitizer still reports data that is handed over by an atomic alone.
// Included at the end of simt.h.
#pragma once

#include "simt.h"

namespace simt {

// Keeps an argument out of template deduction: atomicAdd(unsigned*, 1) must mean unsigned.
template <class T>
struct Exactly {
  using type = T;
};

template <class T, class Update>
inline T read_modify_write(T* address, Update update, SourceLine where) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "atomics work on 4 or 8 bytes");
  using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
  preemption_point(where);
  Bits* bits = reinterpret_cast<Bits*>(address);
  Bits old_bits = __atomic_load_n(bits, __ATOMIC_RELAXED);
  for (;;) {
    const Bits new_bits = bit_cast<Bits>(static_cast<T>(update(bit_cast<T>(old_bits))));
    if (__atomic_compare_exchange_n(bits, &old_bits, new_bits, false, __ATOMIC_RELAXED,
                                    __ATOMIC_RELAXED)) {
      return bit_cast<T>(old_bits);
    }
  }
}

}  // namespace simt

#define SIMT_ATOMIC(NAME, NEW_VALUE)                                            \
  template <class T>                                                            \
  inline T NAME(T* address, typename simt::Exactly<T>::type value, SIMT_HERE) { \
    return simt::read_modify_write<T>(                                          \
        address, [value]([[maybe_unused]] T old) { return NEW_VALUE; }, where); \
  }
SIMT_ATOMIC(atomicAdd, old + value)
SIMT_ATOMIC(atomicSub, old - value)
SIMT_ATOMIC(atomicMin, value < old ? value : old)
SIMT_ATOMIC(atomicMax, old < value ? value : old)
SIMT_ATOMIC(atomicAnd, old& value)
SIMT_ATOMIC(atomicOr, old | value)
SIMT_ATOMIC(atomicXor, old ^ value)
SIMT_ATOMIC(atomicExch, value)
#undef SIMT_ATOMIC

template <class T>
inline T atomicCAS(T* address, typename simt::Exactly<T>::type expected,
                   typename simt::Exactly<T>::type desired, SIMT_HERE) {
  return simt::read_modify_write<T>(
      address, [=](T old) { return old == expected ? desired : old; }, where);
}
