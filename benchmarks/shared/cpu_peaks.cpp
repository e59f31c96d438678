// What a processor reaches with nothing but multiplications and sums, all in its registers.

#include "vectors.h"

constexpr int kSums = kSumVectors, kSteps = 32;

// Let the compiler believe that a register changes here.
#if defined(__AVX512F__)
inline void touch(__m512i& a) { asm volatile("" : "+v"(a)); }
inline void touch(__m512& a) { asm volatile("" : "+v"(a)); }
#else
template <class Vector>
inline void touch(Vector& a) {
  asm volatile("" : "+x"(a.low), "+x"(a.high));
}
#endif

template <int kBits>
float multiply_codes(int64_t num_rounds) {
  uint8_t ones[64];
  __builtin_memset(ones, 1, sizeof ones);
  Bytes codes = load_bytes(ones);
  int32_t four;
  __builtin_memcpy(&four, ones, sizeof four);
  Floats total = zeros();
  for (int64_t round = 0; round < num_rounds; ++round) {
    Dots<kBits> sums[kSums];
#pragma GCC unroll 32
    for (int step = 0; step < kSteps; ++step)
#pragma GCC unroll 16
      for (int i = 0; i < kSums; ++i) {
        touch(codes);
        sums[i].add(codes, four);
      }
#pragma GCC unroll 16
    for (int i = 0; i < kSums; ++i) total = total + sums[i].floats();
  }
  return reduce_add(total);
}

extern "C" {

// Vectors that a round multiplies: of 16 floats, or of 64 codes.
int64_t proserve_vectors_per_round() { return int64_t{kSums} * kSteps; }

float proserve_multiply_floats(int64_t num_rounds) {
  Floats numbers = all(1.0f), total = zeros();
  for (int64_t round = 0; round < num_rounds; ++round) {
    Floats sums[kSums];
#pragma GCC unroll 16
    for (int i = 0; i < kSums; ++i) sums[i] = zeros();
#pragma GCC unroll 32
    for (int step = 0; step < kSteps; ++step)
#pragma GCC unroll 16
      for (int i = 0; i < kSums; ++i) {
        touch(numbers);
        sums[i] = fma(numbers, numbers, sums[i]);
      }
#pragma GCC unroll 16
    for (int i = 0; i < kSums; ++i) total = total + sums[i];
  }
  return reduce_add(total);
}

float proserve_multiply_4_bits(int64_t num_rounds) { return multiply_codes<4>(num_rounds); }
float proserve_multiply_8_bits(int64_t num_rounds) { return multiply_codes<8>(num_rounds); }
}
