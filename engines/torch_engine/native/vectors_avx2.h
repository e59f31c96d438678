// `vectors.h` for CPUs with AVX2, FMA and F16C: a vector is two registers.

#pragma once

struct Floats {
  __m256 low, high;
};
struct Ints {
  __m256i low, high;
};
struct Mask {
  __m256 low, high;
};
struct Bytes {
  __m256i low, high;
};
struct Longs {
  __m256i low, high;
};

constexpr int kSumVectors = 4;
constexpr int kHalvesAtOnce = 1;  // of a panel of 32 outputs
constexpr int kTileRows = 4;
constexpr bool kCodesAreSigned = true;  // of 8 bits: `Dots` takes 128 from each

inline Floats zeros() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Floats all(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }

inline Floats load(const float* source) {
  return {_mm256_loadu_ps(source), _mm256_loadu_ps(source + 8)};
}

inline Floats load(const KVBFloat16* source) {
  const auto* halves = reinterpret_cast<const __m128i*>(source);
  const auto widen = [](__m128i eight) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(eight), 16));
  };
  return {widen(_mm_loadu_si128(halves)), widen(_mm_loadu_si128(halves + 1))};
}

inline Floats load_float16(const uint8_t* source) {
  const auto* halves = reinterpret_cast<const __m128i*>(source);
  return {_mm256_cvtph_ps(_mm_loadu_si128(halves)), _mm256_cvtph_ps(_mm_loadu_si128(halves + 1))};
}

// Zeros where the mask is not set.
inline Floats load_some(Mask mask, const float* source) {
  return {_mm256_maskload_ps(source, _mm256_castps_si256(mask.low)),
          _mm256_maskload_ps(source + 8, _mm256_castps_si256(mask.high))};
}

inline void store(float* target, Floats values) {
  _mm256_storeu_ps(target, values.low);
  _mm256_storeu_ps(target + 8, values.high);
}

inline void store_some(Mask mask, float* target, Floats values) {
  _mm256_maskstore_ps(target, _mm256_castps_si256(mask.low), values.low);
  _mm256_maskstore_ps(target + 8, _mm256_castps_si256(mask.high), values.high);
}

// To the nearest, ties to even, as PyTorch rounds; NaN stays NaN.
inline void store(KVBFloat16* target, Floats values) {
  const auto rounded = [](__m256 numbers) {
    const __m256i bits = _mm256_castps_si256(numbers);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF));
    const __m256i shifted = _mm256_srli_epi32(_mm256_add_epi32(bits, half), 16);
    const __m256 is_nan = _mm256_cmp_ps(numbers, numbers, _CMP_UNORD_Q);
    return _mm256_blendv_epi8(shifted, _mm256_set1_epi32(0x7FC0), _mm256_castps_si256(is_nan));
  };
  // Packing takes the registers' quarters in turn.
  const __m256i packed = _mm256_packus_epi32(rounded(values.low), rounded(values.high));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), _mm256_permute4x64_epi64(packed, 0xD8));
}

inline Floats operator+(Floats a, Floats b) {
  return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)};
}
inline Floats operator-(Floats a, Floats b) {
  return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)};
}
inline Floats operator*(Floats a, Floats b) {
  return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
}
inline Floats operator/(Floats a, Floats b) {
  return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)};
}

inline Floats fma(Floats a, Floats b, Floats c) {  // a b + c
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline Floats fms(Floats a, Floats b, Floats c) {  // a b - c
  return {_mm256_fmsub_ps(a.low, b.low, c.low), _mm256_fmsub_ps(a.high, b.high, c.high)};
}
inline Floats fnma(Floats a, Floats b, Floats c) {  // c - a b
  return {_mm256_fnmadd_ps(a.low, b.low, c.low), _mm256_fnmadd_ps(a.high, b.high, c.high)};
}
inline Floats max(Floats a, Floats b) {
  return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)};
}
inline Floats abs(Floats a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, a.low), _mm256_andnot_ps(sign, a.high)};
}

inline Floats round(Floats a) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.low, kNearest), _mm256_round_ps(a.high, kNearest)};
}

// `power` is whole, and at least -150. In two steps, since 2 to the power of -150 is no float; the
// second one alone rounds.
inline Floats times_power_of_2(Floats a, Floats power) {
  const auto times = [](__m256 number, __m256 exponent) {
    const __m256i whole = _mm256_cvtps_epi32(_mm256_min_ps(exponent, _mm256_set1_ps(254.0f)));
    const __m256i first = _mm256_srai_epi32(whole, 1), second = _mm256_sub_epi32(whole, first);
    const auto power_of_2 = [](__m256i n) {
      const __m256i biased = _mm256_add_epi32(n, _mm256_set1_epi32(127));
      return _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
    };
    return _mm256_mul_ps(_mm256_mul_ps(number, power_of_2(first)), power_of_2(second));
  };
  return {times(a.low, power.low), times(a.high, power.high)};
}

// The same tree as AVX-512's own: halves, quarters, and so on.
inline float reduce_max(Floats a) {
  const __m256 eight = _mm256_max_ps(a.low, a.high);
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
inline float reduce_add(Floats a) {
  const __m256 eight = _mm256_add_ps(a.low, a.high);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline float first_of(Floats a) { return _mm256_cvtss_f32(a.low); }

inline Mask is_less(Floats a, Floats b) {
  return {_mm256_cmp_ps(a.low, b.low, _CMP_LT_OQ), _mm256_cmp_ps(a.high, b.high, _CMP_LT_OQ)};
}
inline Mask is_equal(Floats a, Floats b) {
  return {_mm256_cmp_ps(a.low, b.low, _CMP_EQ_OQ), _mm256_cmp_ps(a.high, b.high, _CMP_EQ_OQ)};
}
inline Mask any_is_nan(Floats a, Floats b) {
  return {_mm256_cmp_ps(a.low, b.low, _CMP_UNORD_Q), _mm256_cmp_ps(a.high, b.high, _CMP_UNORD_Q)};
}
inline Floats select(Mask mask, Floats yes, Floats no) {
  return {_mm256_blendv_ps(no.low, yes.low, mask.low),
          _mm256_blendv_ps(no.high, yes.high, mask.high)};
}
inline int bits(Mask mask) {
  return _mm256_movemask_ps(mask.low) | _mm256_movemask_ps(mask.high) << 8;
}
inline bool any(Mask mask) { return bits(mask) != 0; }
inline int first_lane(Mask mask) { return __builtin_ctz(bits(mask)); }

// The first `count` lanes; any number is fine.
inline Mask first_lanes(int64_t count) {
  const int whole = count >= kLanes ? kLanes : count <= 0 ? 0 : static_cast<int>(count);
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(whole), lanes)),
          _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(whole - 8), lanes))};
}

inline Ints round_to_ints(Floats a) { return {_mm256_cvtps_epi32(a.low), _mm256_cvtps_epi32(a.high)}; }
inline int32_t reduce_add(Ints a, Ints b) {
  const __m256i eight = _mm256_add_epi32(_mm256_add_epi32(a.low, a.high),
                                         _mm256_add_epi32(b.low, b.high));
  __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4E));
  return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xB1)));
}
inline void store_bytes(int8_t* target, Ints a) {
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packs_epi32(a.low, a.high), 0xD8);
  const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(packed),
                                        _mm256_extracti128_si256(packed, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(target), bytes);
}

inline Bytes load_bytes(const uint8_t* source) {
  const auto* halves = reinterpret_cast<const __m256i*>(source);
  return {_mm256_loadu_si256(halves), _mm256_loadu_si256(halves + 1)};
}

// Each byte's low and high four bits.
inline void split(const uint8_t* source, uint8_t* low, uint8_t* high) {
  const __m256i low_half = _mm256_set1_epi8(0x0F);
  for (int half = 0; half < 64; half += 32) {
    const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + half));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(low + half), _mm256_and_si256(packed, low_half));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(high + half),
                        _mm256_and_si256(_mm256_srli_epi16(packed, 4), low_half));
  }
}

// Or the compiler multiplies a whole group before it adds, by way of memory.
inline void keep_in_registers(__m256i& low, __m256i& high) { asm("" : "+x"(low), "+x"(high)); }

// In each lane, the dot product of four unsigned codes and four signed ones, summed up.
template <int kBits>
struct Dots;

// With codes up to 15, the eight sums of a group's pairs stay below 2 to the power of 15:
// 8 * 2 * 15 * 127 = 30,480.
template <>
struct Dots<4> {
  __m256i low = _mm256_setzero_si256(), high = _mm256_setzero_si256();  // of 16 bits

  void add(Bytes codes, int32_t four) {
    const __m256i inputs = _mm256_set1_epi32(four);
    low = _mm256_add_epi16(low, _mm256_maddubs_epi16(codes.low, inputs));
    high = _mm256_add_epi16(high, _mm256_maddubs_epi16(codes.high, inputs));
    keep_in_registers(low, high);
  }
  Floats floats() const {
    const __m256i ones = _mm256_set1_epi16(1);
    return {_mm256_cvtepi32_ps(_mm256_madd_epi16(low, ones)),
            _mm256_cvtepi32_ps(_mm256_madd_epi16(high, ones))};
  }
};

// Codes less 128, or a pair's sum would not fit: 2 * 128 * 127 = 32,512 does. The instruction wants
// one side unsigned: what is negative gives its sign to the other side.
//
// Source of the signs: llama.cpp's Q8_0 products.
template <>
struct Dots<8> {
  __m256i low = _mm256_setzero_si256(), high = _mm256_setzero_si256();

  void add(Bytes codes, int32_t four) {
    const __m256i inputs = _mm256_set1_epi32(four), ones = _mm256_set1_epi16(1);
    const auto sum = [&](__m256i sums, __m256i own) {
      const __m256i weights = _mm256_xor_si256(own, _mm256_set1_epi8(-128));
      const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(weights),
                                                 _mm256_sign_epi8(inputs, weights));
      return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, ones));
    };
    low = sum(low, codes.low);
    high = sum(high, codes.high);
    keep_in_registers(low, high);
  }
  Floats floats() const { return {_mm256_cvtepi32_ps(low), _mm256_cvtepi32_ps(high)}; }
};

inline Longs all_longs(int64_t value) {
  return {_mm256_set1_epi64x(value), _mm256_set1_epi64x(value)};
}
inline Longs load_longs(const int64_t* source) {
  const auto* halves = reinterpret_cast<const __m256i*>(source);
  return {_mm256_loadu_si256(halves), _mm256_loadu_si256(halves + 1)};
}
inline void store(int64_t* target, Longs a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), a.low);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(target) + 1, a.high);
}
inline Longs add_longs(Longs a, Longs b) {
  return {_mm256_add_epi64(a.low, b.low), _mm256_add_epi64(a.high, b.high)};
}
inline int64_t reduce_add_longs(Longs a) {
  const __m256i four = _mm256_add_epi64(a.low, a.high);
  const __m128i two = _mm_add_epi64(_mm256_castsi256_si128(four), _mm256_extracti128_si256(four, 1));
  return _mm_extract_epi64(two, 0) + _mm_extract_epi64(two, 1);
}

// Zeros where `a` is less.
inline Longs at_least(Longs a, Longs floor) {
  return {_mm256_andnot_si256(_mm256_cmpgt_epi64(floor.low, a.low), a.low),
          _mm256_andnot_si256(_mm256_cmpgt_epi64(floor.high, a.high), a.high)};
}

// Of 16 numbers from 0 to 2 to the power of 40, without their fractions.
inline void truncate(Floats a, Longs (&halves)[2]) {
  // Above 2 to the power of 52, a double's last bits are a whole number.
  const auto whole = [](__m128 four) {
    const __m256d shift = _mm256_set1_pd(4503599627370496.0);
    const __m256d shifted = _mm256_add_pd(_mm256_floor_pd(_mm256_cvtps_pd(four)), shift);
    return _mm256_xor_si256(_mm256_castpd_si256(shifted), _mm256_castpd_si256(shift));
  };
  halves[0] = {whole(_mm256_castps256_ps128(a.low)), whole(_mm256_extractf128_ps(a.low, 1))};
  halves[1] = {whole(_mm256_castps256_ps128(a.high)), whole(_mm256_extractf128_ps(a.high, 1))};
}

// Write those that are at least `floor`, one behind the other; returns how many. Eight places are
// written to.
inline int64_t write_at_least(int64_t* target, Longs a, Longs floor) {
  const __m256i is_less = _mm256_and_si256(_mm256_cmpgt_epi64(floor.low, a.low),
                                           _mm256_cmpgt_epi64(floor.high, a.high));
  if (_mm256_movemask_epi8(is_less) == -1) return 0;
  int64_t numbers[8];
  store(numbers, a);
  const int64_t least = _mm256_extract_epi64(floor.low, 0);
  int64_t count = 0;
  for (const int64_t number : numbers) {
    target[count] = number;
    count += number >= least;
  }
  return count;
}

// Turn 8 rows of 8 numbers into 8 columns.
inline void transpose_square(__m256 (&rows)[8]) {
  __m256 pairs[8], quads[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    quads[i] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
    quads[i + 1] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0xEE);
    quads[i + 2] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
    quads[i + 3] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xEE);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    rows[i] = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x20);
    rows[i + 4] = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x31);
  }
}

// Turn 16 rows of 16 numbers into 16 columns.
inline void transpose(Floats (&rows)[kLanes]) {
  __m256 squares[4][8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    squares[0][i] = rows[i].low;
    squares[1][i] = rows[i].high;
    squares[2][i] = rows[i + 8].low;
    squares[3][i] = rows[i + 8].high;
  }
#pragma GCC unroll 4
  for (auto& square : squares) transpose_square(square);
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    rows[i] = {squares[0][i], squares[2][i]};
    rows[i + 8] = {squares[1][i], squares[3][i]};
  }
}
