// base^exponent in fp64, rounded once but for about one case in 2^45: libm's pow, which the host
// uses, is within 0.52 of a unit in the last place, and CUDA's within 2.
//
// Squaring in numbers of two doubles (Dekker, "A floating-point technique for extending the
// available precision", 1971). Their product is off by a few 2^-104 relative, 24 squarings by 2^-80
// at most where the result matters: 1 - base^exponent is what is wanted, and base < 1.
#pragma once
#include "rounding.h"

namespace fishfast {

struct TwoDoubles {
  double high, low;
};

FF_HOST_DEVICE TwoDoubles product(const TwoDoubles& a, const TwoDoubles& b) {
  const double high = mul_rn(a.high, b.high);
  const double crossed = add_rn(mul_rn(a.high, b.low), mul_rn(a.low, b.high));
  const double low = add_rn(fma_rn(a.high, b.high, -high), crossed);
  const double sum = add_rn(high, low);
  return {sum, add_rn(low, add_rn(high, -sum))};
}

FF_HOST_DEVICE double integer_power(double base, uint64_t exponent) {
  TwoDoubles result = {1.0, 0.0}, square = {base, 0.0};
  while (exponent > 0) {
    if (exponent & 1u) result = product(result, square);
    square = product(square, square);
    exponent >>= 1;
  }
  return result.high;
}

}  // namespace fishfast
