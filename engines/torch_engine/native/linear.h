// Matrix products of 8-bit activations with 4- or 8-bit weights, both in groups of 32 inputs.
//
//   weight[n][k]     = scale[n][g] * code[n][k] + offset[n][g]     code: unsigned, g = k / 32
//   activation[m][k] = scale[m][g] * code[m][k]                    code: signed
//   output[m][n]     = sum over g of scale[n][g] * scale[m][g] * (integer dot product)
//                                  + offset[n][g] * sum[m][g]
//
// A panel is 32 outputs. Its groups follow each other; each holds 32 scales and 32 offsets in half
// precision and then the codes: for each 4 inputs ("step") the outputs' bytes, as `vpdpbusd` takes
// them. With 4 bits, the low halves are steps 0 to 3, the high ones steps 4 to 7.
// `cpu_weights.py` writes them.
//
// Source: the arithmetic of llama.cpp's Q4_1 x Q8_1 products.

#pragma once

#include "team.h"
#include "vectors.h"

constexpr int kGroup = 32;
constexpr int kPanel = 32;
constexpr int kSteps = kGroup / 4;
constexpr int kStepBytes = kPanel * 4;
constexpr int kScaleBytes = 2 * kPanel * 2;
constexpr int kGroupCodes = kSteps * kStepBytes;  // unpacked
constexpr int kTileRows = 6;

struct Matrix {
  const uint8_t* panels;
  int32_t num_outputs;
  int32_t num_inputs;  // a multiple of 32
  int32_t bits;        // 4 or 8

  int num_groups() const { return num_inputs / kGroup; }
  int num_panels() const { return (num_outputs + kPanel - 1) / kPanel; }
  int64_t group_bytes() const { return kScaleBytes + kGroupCodes * bits / 8; }
};

// Quantised rows: codes (num_rows, num_inputs), the others (num_rows, num_inputs / 32).
struct Activations {
  int8_t* codes;
  float* scales;
  float* sums;
};

inline void quantize_row(const float* row, int num_inputs, int64_t index, const Activations& to) {
  int8_t* codes = to.codes + index * num_inputs;
  float* scales = to.scales + index * (num_inputs / kGroup);
  float* sums = to.sums + index * (num_inputs / kGroup);
  for (int group = 0; group < num_inputs / kGroup; ++group) {
    const __m512 low = load(row + group * kGroup), high = load(row + group * kGroup + kLanes);
    const float largest =
        _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(low), _mm512_abs_ps(high)));
    // 0, or NaN where a number is not finite, which the maximum might hide.
    const __m512 zero = _mm512_setzero_ps();
    const float poison =
        _mm512_reduce_add_ps(_mm512_fmadd_ps(low, zero, _mm512_mul_ps(high, zero)));
    const float scale = largest / 127.0f + poison;
    const __m512 inverse = _mm512_set1_ps(scale > 0.0f ? 127.0f / largest : 0.0f);
    const __m512i low_codes = _mm512_cvtps_epi32(_mm512_mul_ps(low, inverse));
    const __m512i high_codes = _mm512_cvtps_epi32(_mm512_mul_ps(high, inverse));
    auto* target = reinterpret_cast<__m128i*>(codes + group * kGroup);
    _mm_storeu_si128(target, _mm512_cvtepi32_epi8(low_codes));
    _mm_storeu_si128(target + 1, _mm512_cvtepi32_epi8(high_codes));
    scales[group] = scale;
    sums[group] = scale * static_cast<float>(
                              _mm512_reduce_add_epi32(_mm512_add_epi32(low_codes, high_codes)));
  }
}

// A panel as the kernel reads it.
struct Panel {
  const uint8_t* codes;
  int64_t stride;  // bytes from one group's codes to the next one's
  const float* scales;
  const float* offsets;
  int num_groups;
};

// One thread's memory for a panel: codes, then scales, then offsets.
inline int64_t panel_memory_bytes(int max_inputs) {
  return static_cast<int64_t>(max_inputs / kGroup) *
         (kGroupCodes + 2 * kPanel * static_cast<int64_t>(sizeof(float)));
}

inline Panel unpack(const Matrix& matrix, int index, uint8_t* memory) {
  const int num_groups = matrix.num_groups();
  const uint8_t* source = matrix.panels + index * num_groups * matrix.group_bytes();
  float* scales = reinterpret_cast<float*>(memory + num_groups * kGroupCodes);
  float* offsets = scales + num_groups * kPanel;
  const __m512i low_half = _mm512_set1_epi8(0x0F);
  for (int group = 0; group < num_groups; ++group) {
    const uint8_t* from = source + group * matrix.group_bytes();
    const auto* halves = reinterpret_cast<const __m256i*>(from);
    for (int part = 0; part < 2; ++part) {
      store(scales + group * kPanel + part * kLanes,
            _mm512_cvtph_ps(_mm256_loadu_si256(halves + part)));
      store(offsets + group * kPanel + part * kLanes,
            _mm512_cvtph_ps(_mm256_loadu_si256(halves + 2 + part)));
    }
    if (matrix.bits == 4) {
      uint8_t* to = memory + group * kGroupCodes;
#pragma GCC unroll 8
      for (int place = 0; place < kGroupCodes / 2; place += 64) {
        const __m512i packed = _mm512_loadu_si512(from + kScaleBytes + place);
        _mm512_storeu_si512(to + place, _mm512_and_si512(packed, low_half));
        _mm512_storeu_si512(to + kGroupCodes / 2 + place,
                            _mm512_and_si512(_mm512_srli_epi16(packed, 4), low_half));
      }
    }
  }
  if (matrix.bits == 4) return {memory, kGroupCodes, scales, offsets, num_groups};
  return {source + kScaleBytes, matrix.group_bytes(), scales, offsets, num_groups};
}

// Multiply `kRows` rows from `row` on by a panel.
template <int kRows, class Epilogue>
inline void multiply(const Panel& panel, const Activations& rows, int64_t row, int column,
                     const Epilogue& epilogue) {
  const int num_groups = panel.num_groups;
  const int64_t num_inputs = static_cast<int64_t>(num_groups) * kGroup;
  const int8_t* codes = rows.codes + row * num_inputs;
  const float* scales = rows.scales + row * num_groups;
  const float* sums = rows.sums + row * num_groups;
  __m512 outputs[kRows][2];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) outputs[r][0] = outputs[r][1] = _mm512_setzero_ps();
  for (int group = 0; group < num_groups; ++group) {
    __m512i dots[kRows][2];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) dots[r][0] = dots[r][1] = _mm512_setzero_si512();
    const uint8_t* weights = panel.codes + group * panel.stride;
#pragma GCC unroll 8
    for (int step = 0; step < kSteps; ++step) {
      const __m512i left = _mm512_loadu_si512(weights + step * kStepBytes);
      const __m512i right = _mm512_loadu_si512(weights + step * kStepBytes + 64);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        int32_t four;
        __builtin_memcpy(&four, codes + r * num_inputs + group * kGroup + step * 4, 4);
        const __m512i inputs = _mm512_set1_epi32(four);
        dots[r][0] = _mm512_dpbusd_epi32(dots[r][0], left, inputs);
        dots[r][1] = _mm512_dpbusd_epi32(dots[r][1], right, inputs);
      }
    }
    const __m512 scale[2] = {load(panel.scales + group * kPanel),
                             load(panel.scales + group * kPanel + kLanes)};
    const __m512 offset[2] = {load(panel.offsets + group * kPanel),
                              load(panel.offsets + group * kPanel + kLanes)};
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const __m512 row_scale = _mm512_set1_ps(scales[r * num_groups + group]);
      const __m512 row_sum = _mm512_set1_ps(sums[r * num_groups + group]);
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const __m512 both = _mm512_mul_ps(scale[half], row_scale);
        outputs[r][half] =
            _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[r][half]), both, outputs[r][half]);
        outputs[r][half] = _mm512_fmadd_ps(offset[half], row_sum, outputs[r][half]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) epilogue(row + r, column, outputs[r][0], outputs[r][1]);
}

inline __mmask16 columns_left(int num_columns, int column) {
  const int left = num_columns - column;
  return left >= kLanes ? 0xFFFF : left <= 0 ? 0 : static_cast<__mmask16>((1 << left) - 1);
}

// What becomes of a product: two vectors of neighbouring outputs of a row.
struct Store {
  float* outputs;
  int num_columns;

  void operator()(int64_t row, int column, __m512 left, __m512 right) const {
    float* target = outputs + row * num_columns + column;
    _mm512_mask_storeu_ps(target, columns_left(num_columns, column), left);
    _mm512_mask_storeu_ps(target + kLanes, columns_left(num_columns, column + kLanes), right);
  }
};

// As `Store`, and the largest of each panel's outputs, (num_rows, num_panels); NaN if one is.
struct StoreWithLargest {
  Store store;
  float* largest;
  int num_panels;

  void operator()(int64_t row, int column, __m512 left, __m512 right) const {
    store(row, column, left, right);
    const __m512 lowest = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
    const __mmask16 first = columns_left(store.num_columns, column);
    const __mmask16 second = columns_left(store.num_columns, column + kLanes);
    left = _mm512_mask_mov_ps(lowest, first, left);
    right = _mm512_mask_mov_ps(lowest, second, right);
    const bool has_nan = _mm512_cmp_ps_mask(left, right, _CMP_UNORD_Q);
    largest[row * num_panels + column / kPanel] =
        has_nan ? std::numeric_limits<float>::quiet_NaN()
                : _mm512_reduce_max_ps(_mm512_max_ps(left, right));
  }
};

struct AddTo {
  float* outputs;
  int num_columns;

  void operator()(int64_t row, int column, __m512 left, __m512 right) const {
    float* target = outputs + row * num_columns + column;
    const __mmask16 first = columns_left(num_columns, column);
    const __mmask16 second = columns_left(num_columns, column + kLanes);
    _mm512_mask_storeu_ps(target, first,
                          _mm512_add_ps(_mm512_maskz_loadu_ps(first, target), left));
    _mm512_mask_storeu_ps(target + kLanes, second,
                          _mm512_add_ps(_mm512_maskz_loadu_ps(second, target + kLanes), right));
  }
};

// A panel holds 16 columns of the gate and the same 16 of `up`.
struct StoreSiluProduct {
  float* outputs;
  int num_columns;

  void operator()(int64_t row, int column, __m512 gate, __m512 up) const {
    _mm512_mask_storeu_ps(outputs + row * num_columns + column / 2,
                          columns_left(num_columns, column / 2), _mm512_mul_ps(silu(gate), up));
  }
};

// Multiply all rows; every thread of the team calls it.
template <class Epilogue>
inline void linear(Team& team, const Matrix& matrix, const Activations& rows, int64_t num_rows,
                   uint8_t* panel_memory, const Epilogue& epilogue) {
  // Rows are divided too where the panels alone would leave threads idle, in whole tiles.
  const int64_t num_panels = matrix.num_panels(), num_threads = team.num_threads();
  const int64_t num_tiles = (num_rows + kTileRows - 1) / kTileRows;
  int64_t num_parts = 1;
  while (num_panels * num_parts < 4 * num_threads && num_tiles >= 8 * num_parts) num_parts *= 2;
  team.take_turns(num_panels * num_parts, [&](int64_t item) {
    const int index = static_cast<int>(item / num_parts);
    const int64_t part = item % num_parts;
    const int64_t first = num_tiles * part / num_parts * kTileRows;
    int64_t end = num_tiles * (part + 1) / num_parts * kTileRows;
    if (end > num_rows) end = num_rows;
    const Panel panel = unpack(matrix, index, panel_memory);
    const int column = index * kPanel;
    int64_t row = first;
    for (; row + kTileRows <= end; row += kTileRows)
      multiply<kTileRows>(panel, rows, row, column, epilogue);
    switch (end - row) {
      case 1: multiply<1>(panel, rows, row, column, epilogue); break;
      case 2: multiply<2>(panel, rows, row, column, epilogue); break;
      case 3: multiply<3>(panel, rows, row, column, epilogue); break;
      case 4: multiply<4>(panel, rows, row, column, epilogue); break;
      case 5: multiply<5>(panel, rows, row, column, epilogue); break;
      default: break;
    }
  });
}
