// What mutants.py puts in the place of an acquire or a release: the same, with less order.
//
// They let other threads run, as the originals do, so that a mutant is judged by what it lost and
// not by an endless loop. Included before the mutant (g++ -include).
#pragma once
#include "simt.h"

namespace mutants {

// Ordinary accesses: another block's is a data race.
template <class T>
inline T plain_load(const T* address, SIMT_HERE) {
  simt::spin(where);
  return *address;
}
template <class T>
inline void plain_store(T* address, typename std::common_type<T>::type value, SIMT_HERE) {
  *address = value;
  simt::released(where);
}

// Atomic, but what the other side wrote before is not handed over with the flag.
template <class T>
inline T relaxed_load(const T* address, SIMT_HERE) {
  simt::spin(where);
  return __atomic_load_n(address, __ATOMIC_RELAXED);
}
template <class T>
inline void relaxed_store(T* address, typename std::common_type<T>::type value, SIMT_HERE) {
  __atomic_store_n(address, value, __ATOMIC_RELAXED);
  simt::released(where);
}

}  // namespace mutants
