// Sixteen floats at a time, on either instruction set. Every sum here has one order, whatever else
// is in the batch.
//
// vectors_avx512.h and vectors_avx2.h have the same names: `Floats`, `Ints` (of 32 bits), `Mask` and
// `Bytes` (64 of them) for 16 lanes, `Longs` for 8 numbers of 64 bits, `Dots` for dot products.

#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <limits>

constexpr int kLanes = 16;

using KVFloat32 = float;
using KVBFloat16 = uint16_t;

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && \
    defined(__AVX512VL__) && defined(__AVX512VNNI__)
#include "vectors_avx512.h"
#else
#include "vectors_avx2.h"
#endif

// How many vectors of each of so many rows are summed at once: as many as stay in registers.
constexpr int vectors_at_once(int num_rows, int num_vectors) {
  const int room = kSumVectors / num_rows;
  return room >= num_vectors ? num_vectors : 1;
}

// e to the power of x, within 2 units in the last place; -inf gives 0, NaN gives NaN.
// A polynomial over [-ln 2 / 2, ln 2 / 2]: Cephes, expf.
inline Floats exp(Floats x) {
  const Floats n = round(x * all(1.44269504f));
  const Floats lowest = max(n, all(-150.0f));
  Floats r = fnma(lowest, all(0.693359375f), x);
  r = fnma(lowest, all(-2.12194440e-4f), r);
  Floats y = all(1.9875691500e-4f);
  y = fma(y, r, all(1.3981999507e-3f));
  y = fma(y, r, all(8.3334519073e-3f));
  y = fma(y, r, all(4.1665795894e-2f));
  y = fma(y, r, all(1.6666665459e-1f));
  y = fma(y, r, all(5.0000001201e-1f));
  y = fma(y, r * r, r + all(1.0f));
  y = times_power_of_2(y, lowest);
  return select(is_less(x, all(-103.0f)), zeros(), y);
}

inline Floats silu(Floats x) {
  const Floats denominator = all(1.0f) + exp(zeros() - x);
  return x / denominator;
}
