// Sixteen floats at a time. Every sum here has one order, whatever else is in the batch.

#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <limits>

constexpr int kLanes = 16;

using KVFloat32 = float;
using KVBFloat16 = uint16_t;

inline __m512 load(const float* source) { return _mm512_loadu_ps(source); }

inline __m512 load(const KVBFloat16* source) {
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

inline void store(float* target, __m512 values) { _mm512_storeu_ps(target, values); }

// To the nearest, ties to even, as PyTorch rounds; NaN stays NaN.
inline void store(KVBFloat16* target, __m512 values) {
  const __m512i bits = _mm512_castps_si512(values);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF));
  __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, half), 16);
  const __mmask16 is_nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
  rounded = _mm512_mask_mov_epi32(rounded, is_nan, _mm512_set1_epi32(0x7FC0));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), _mm512_cvtepi32_epi16(rounded));
}

// e to the power of x, within 2 units in the last place; -inf gives 0, NaN gives NaN.
// A polynomial over [-ln 2 / 2, ln 2 / 2]: Cephes, expf.
inline __m512 exp(__m512 x) {
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)),
                                        _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 lowest = _mm512_max_ps(n, _mm512_set1_ps(-150.0f));
  __m512 r = _mm512_fnmadd_ps(lowest, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(lowest, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 y = _mm512_set1_ps(1.9875691500e-4f);
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.3981999507e-3f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(8.3334519073e-3f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(4.1665795894e-2f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.6666665459e-1f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(5.0000001201e-1f));
  y = _mm512_fmadd_ps(y, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
  y = _mm512_scalef_ps(y, lowest);
  const __mmask16 is_tiny = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-103.0f), _CMP_LT_OQ);
  return _mm512_mask_mov_ps(y, is_tiny, _mm512_setzero_ps());
}

inline __m512 silu(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f);
  const __m512 denominator = _mm512_add_ps(one, exp(_mm512_sub_ps(_mm512_setzero_ps(), x)));
  return _mm512_div_ps(x, denominator);
}

// Turn 16 rows of 16 numbers into 16 columns.
inline void transpose(__m512 (&rows)[kLanes]) {
  __m512 pairs[kLanes], quads[kLanes];
#pragma GCC unroll 8
  for (int i = 0; i < kLanes; i += 2) {
    pairs[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < kLanes; i += 4) {
    quads[i] = _mm512_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
    quads[i + 1] = _mm512_shuffle_ps(pairs[i], pairs[i + 2], 0xEE);
    quads[i + 2] = _mm512_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
    quads[i + 3] = _mm512_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xEE);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512 low = _mm512_shuffle_f32x4(quads[i], quads[i + 4], 0x88);
    const __m512 high = _mm512_shuffle_f32x4(quads[i], quads[i + 4], 0xDD);
    const __m512 low2 = _mm512_shuffle_f32x4(quads[i + 8], quads[i + 12], 0x88);
    const __m512 high2 = _mm512_shuffle_f32x4(quads[i + 8], quads[i + 12], 0xDD);
    rows[i] = _mm512_shuffle_f32x4(low, low2, 0x88);
    rows[i + 8] = _mm512_shuffle_f32x4(low, low2, 0xDD);
    rows[i + 4] = _mm512_shuffle_f32x4(high, high2, 0x88);
    rows[i + 12] = _mm512_shuffle_f32x4(high, high2, 0xDD);
  }
}
