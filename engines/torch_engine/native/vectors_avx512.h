// `vectors.h` for CPUs with AVX-512 VNNI.

#pragma once

using Floats = __m512;  // the compiler has + - * / for it
using Ints = __m512i;
using Mask = __mmask16;
using Bytes = __m512i;
using Longs = __m512i;

constexpr int kSumVectors = 16;
constexpr int kHalvesAtOnce = 2;  // of a panel of 32 outputs
constexpr int kTileRows = 6;
constexpr bool kCodesAreSigned = false;

inline Floats zeros() { return _mm512_setzero_ps(); }
inline Floats all(float value) { return _mm512_set1_ps(value); }

inline Floats load(const float* source) { return _mm512_loadu_ps(source); }

inline Floats load(const KVBFloat16* source) {
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

inline Floats load_float16(const uint8_t* source) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)));
}

// Zeros where the mask is not set.
inline Floats load_some(Mask mask, const float* source) {
  return _mm512_maskz_loadu_ps(mask, source);
}

inline void store(float* target, Floats values) { _mm512_storeu_ps(target, values); }

inline void store_some(Mask mask, float* target, Floats values) {
  _mm512_mask_storeu_ps(target, mask, values);
}

// To the nearest, ties to even, as PyTorch rounds; NaN stays NaN.
inline void store(KVBFloat16* target, Floats values) {
  const __m512i bits = _mm512_castps_si512(values);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF));
  __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, half), 16);
  const __mmask16 is_nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
  rounded = _mm512_mask_mov_epi32(rounded, is_nan, _mm512_set1_epi32(0x7FC0));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), _mm512_cvtepi32_epi16(rounded));
}

inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }    // a b + c
inline Floats fms(Floats a, Floats b, Floats c) { return _mm512_fmsub_ps(a, b, c); }    // a b - c
inline Floats fnma(Floats a, Floats b, Floats c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a b
inline Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Floats abs(Floats a) { return _mm512_abs_ps(a); }

inline Floats round(Floats a) {
  return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

// `power` is whole, and at least -150.
inline Floats times_power_of_2(Floats a, Floats power) { return _mm512_scalef_ps(a, power); }

inline float reduce_max(Floats a) { return _mm512_reduce_max_ps(a); }
inline float reduce_add(Floats a) { return _mm512_reduce_add_ps(a); }
inline float first_of(Floats a) { return _mm512_cvtss_f32(a); }

inline Mask is_less(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
inline Mask is_equal(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
inline Mask any_is_nan(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q); }
inline Floats select(Mask mask, Floats yes, Floats no) {
  return _mm512_mask_mov_ps(no, mask, yes);
}
inline bool any(Mask mask) { return mask != 0; }
inline int first_lane(Mask mask) { return __builtin_ctz(mask); }

// The first `count` lanes; any number is fine.
inline Mask first_lanes(int64_t count) {
  return count >= kLanes ? 0xFFFF : count <= 0 ? 0 : static_cast<Mask>((1 << count) - 1);
}

inline Ints round_to_ints(Floats a) { return _mm512_cvtps_epi32(a); }
inline int32_t reduce_add(Ints a, Ints b) { return _mm512_reduce_add_epi32(_mm512_add_epi32(a, b)); }
inline void store_bytes(int8_t* target, Ints a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(target), _mm512_cvtepi32_epi8(a));
}

inline Bytes load_bytes(const uint8_t* source) { return _mm512_loadu_si512(source); }

// Each byte's low and high four bits.
inline void split(const uint8_t* source, uint8_t* low, uint8_t* high) {
  const __m512i packed = load_bytes(source), low_half = _mm512_set1_epi8(0x0F);
  _mm512_storeu_si512(low, _mm512_and_si512(packed, low_half));
  _mm512_storeu_si512(high, _mm512_and_si512(_mm512_srli_epi16(packed, 4), low_half));
}

// In each lane, the dot product of four unsigned codes and four signed ones, summed up.
template <int kBits>  // 8 is right for 4 as well
struct Dots {
  __m512i sums = _mm512_setzero_si512();

  void add(Bytes codes, int32_t four) {
    sums = _mm512_dpbusd_epi32(sums, codes, _mm512_set1_epi32(four));
  }
  Floats floats() const { return _mm512_cvtepi32_ps(sums); }
};

inline Longs all_longs(int64_t value) { return _mm512_set1_epi64(value); }
inline Longs load_longs(const int64_t* source) { return _mm512_loadu_si512(source); }
inline void store(int64_t* target, Longs a) { _mm512_storeu_si512(target, a); }
inline Longs add_longs(Longs a, Longs b) { return _mm512_add_epi64(a, b); }
inline int64_t reduce_add_longs(Longs a) { return _mm512_reduce_add_epi64(a); }

// Zeros where `a` is less.
inline Longs at_least(Longs a, Longs floor) {
  return _mm512_maskz_mov_epi64(_mm512_cmpge_epi64_mask(a, floor), a);
}

// Of 16 numbers from 0 to 2 to the power of 40, without their fractions.
inline void truncate(Floats a, Longs (&halves)[2]) {
  halves[0] = _mm512_cvttps_epi64(_mm512_castps512_ps256(a));
  halves[1] = _mm512_cvttps_epi64(_mm512_extractf32x8_ps(a, 1));
}

// Write those that are at least `floor`, one behind the other; returns how many. Eight places are
// written to.
inline int64_t write_at_least(int64_t* target, Longs a, Longs floor) {
  const __mmask8 stays = _mm512_cmpge_epi64_mask(a, floor);
  // In a register first: some processors take long to compress into memory. Always: whether there
  // are any is hard to guess.
  _mm512_storeu_si512(target, _mm512_maskz_compress_epi64(stays, a));
  return __builtin_popcount(stays);
}

// Turn 16 rows of 16 numbers into 16 columns.
inline void transpose(Floats (&rows)[kLanes]) {
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
