// Matrix products of 8-bit activations with 4- or 8-bit weights, both in groups of 32 inputs.
//
//   weight[n][k]     = scale[n][g] * code[n][k] + offset[n][g]     code: unsigned, g = k / 32
//   activation[m][k] = scale[m][g] * code[m][k]                    code: signed
//   output[m][n]     = sum over g of scale[n][g] * scale[m][g] * (integer dot product)
//                                  + offset[n][g] * sum[m][g]
//
// A panel is 32 outputs. Its groups follow each other; each holds 32 scales and 32 offsets in half
// precision and then the codes: for each 4 inputs ("step") the outputs' bytes, as `Dots` takes them.
// With 4 bits, the low halves are steps 0 to 3, the high ones steps 4 to 7.
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
constexpr int kHalfStepBytes = kStepBytes / 2;
constexpr int kScaleBytes = 2 * kPanel * 2;
constexpr int kGroupCodes = kSteps * kStepBytes;  // unpacked

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
    const Floats low = load(row + group * kGroup), high = load(row + group * kGroup + kLanes);
    const float largest = reduce_max(max(abs(low), abs(high)));
    // 0, or NaN where a number is not finite, which the maximum might hide.
    const float poison = reduce_add(fma(low, zeros(), high * zeros()));
    const float scale = largest / 127.0f + poison;
    const Floats inverse = all(scale > 0.0f ? 127.0f / largest : 0.0f);
    const Ints low_codes = round_to_ints(low * inverse);
    const Ints high_codes = round_to_ints(high * inverse);
    store_bytes(codes + group * kGroup, low_codes);
    store_bytes(codes + group * kGroup + kLanes, high_codes);
    scales[group] = scale;
    sums[group] = scale * static_cast<float>(reduce_add(low_codes, high_codes));
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
  for (int group = 0; group < num_groups; ++group) {
    const uint8_t* from = source + group * matrix.group_bytes();
    for (int part = 0; part < 2; ++part) {
      const Floats scale = load_float16(from + part * 2 * kLanes);
      Floats offset = load_float16(from + 2 * kPanel + part * 2 * kLanes);
      if (kCodesAreSigned && matrix.bits == 8) offset = fma(scale, all(128.0f), offset);
      store(scales + group * kPanel + part * kLanes, scale);
      store(offsets + group * kPanel + part * kLanes, offset);
    }
    if (matrix.bits == 4) {
      uint8_t* to = memory + group * kGroupCodes;
#pragma GCC unroll 8
      for (int place = 0; place < kGroupCodes / 2; place += 64)
        split(from + kScaleBytes + place, to + place, to + kGroupCodes / 2 + place);
    }
  }
  if (matrix.bits == 4) return {memory, kGroupCodes, scales, offsets, num_groups};
  return {source + kScaleBytes, matrix.group_bytes(), scales, offsets, num_groups};
}

// Multiply `kRows` rows from `row` on by a panel of `kBits`.
template <int kRows, int kBits, class Epilogue>
inline void multiply(const Panel& panel, const Activations& rows, int64_t row, int column,
                     const Epilogue& epilogue) {
  const int num_groups = panel.num_groups;
  const int64_t num_inputs = static_cast<int64_t>(num_groups) * kGroup;
  const int8_t* codes = rows.codes + row * num_inputs;
  const float* scales = rows.scales + row * num_groups;
  const float* sums = rows.sums + row * num_groups;
  Floats outputs[kRows][2];
#pragma GCC unroll 2
  for (int first = 0; first < 2; first += kHalvesAtOnce) {
    Floats products[kRows][kHalvesAtOnce];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
      for (int half = 0; half < kHalvesAtOnce; ++half) products[r][half] = zeros();
    for (int group = 0; group < num_groups; ++group) {
      Dots<kBits> dots[kRows][kHalvesAtOnce];
      const uint8_t* weights = panel.codes + group * panel.stride + first * kHalfStepBytes;
#pragma GCC unroll 8
      for (int step = 0; step < kSteps; ++step) {
        Bytes four_inputs[kHalvesAtOnce];
#pragma GCC unroll 2
        for (int half = 0; half < kHalvesAtOnce; ++half)
          four_inputs[half] = load_bytes(weights + step * kStepBytes + half * kHalfStepBytes);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          int32_t four;
          __builtin_memcpy(&four, codes + r * num_inputs + group * kGroup + step * 4, 4);
#pragma GCC unroll 2
          for (int half = 0; half < kHalvesAtOnce; ++half)
            dots[r][half].add(four_inputs[half], four);
        }
      }
      Floats scale[kHalvesAtOnce], offset[kHalvesAtOnce];
#pragma GCC unroll 2
      for (int half = 0; half < kHalvesAtOnce; ++half) {
        const int place = group * kPanel + (first + half) * kLanes;
        scale[half] = load(panel.scales + place);
        offset[half] = load(panel.offsets + place);
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const Floats row_scale = all(scales[r * num_groups + group]);
        const Floats row_sum = all(sums[r * num_groups + group]);
#pragma GCC unroll 2
        for (int half = 0; half < kHalvesAtOnce; ++half) {
          const Floats both = scale[half] * row_scale;
          products[r][half] = fma(dots[r][half].floats(), both, products[r][half]);
          products[r][half] = fma(offset[half], row_sum, products[r][half]);
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
      for (int half = 0; half < kHalvesAtOnce; ++half) outputs[r][first + half] = products[r][half];
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) epilogue(row + r, column, outputs[r][0], outputs[r][1]);
}

// Multiply rows [first, end) by a panel.
template <int kBits, class Epilogue>
inline void multiply_all(const Panel& panel, const Activations& rows, int64_t first, int64_t end,
                         int column, const Epilogue& epilogue) {
  int64_t row = first;
  for (; row + kTileRows <= end; row += kTileRows)
    multiply<kTileRows, kBits>(panel, rows, row, column, epilogue);
  switch (end - row) {
    case 1: multiply<1, kBits>(panel, rows, row, column, epilogue); break;
    case 2: multiply<2, kBits>(panel, rows, row, column, epilogue); break;
    case 3: multiply<3, kBits>(panel, rows, row, column, epilogue); break;
    case 4: multiply<4, kBits>(panel, rows, row, column, epilogue); break;
    case 5: multiply<5, kBits>(panel, rows, row, column, epilogue); break;
    default: break;
  }
}

// What becomes of a product: two vectors of neighbouring outputs of a row.
struct Store {
  float* outputs;
  int num_columns;

  void operator()(int64_t row, int column, Floats left, Floats right) const {
    float* target = outputs + row * num_columns + column;
    store_some(first_lanes(num_columns - column), target, left);
    store_some(first_lanes(num_columns - column - kLanes), target + kLanes, right);
  }
};

// As `Store`, and the largest of each panel's outputs, (num_rows, num_panels); NaN if one is.
struct StoreWithLargest {
  Store store;
  float* largest;
  int num_panels;

  void operator()(int64_t row, int column, Floats left, Floats right) const {
    store(row, column, left, right);
    const Floats lowest = all(-std::numeric_limits<float>::infinity());
    left = select(first_lanes(store.num_columns - column), left, lowest);
    right = select(first_lanes(store.num_columns - column - kLanes), right, lowest);
    largest[row * num_panels + column / kPanel] =
        any(any_is_nan(left, right)) ? std::numeric_limits<float>::quiet_NaN()
                                     : reduce_max(max(left, right));
  }
};

struct AddTo {
  float* outputs;
  int num_columns;

  void operator()(int64_t row, int column, Floats left, Floats right) const {
    float* target = outputs + row * num_columns + column;
    const Mask first = first_lanes(num_columns - column);
    const Mask second = first_lanes(num_columns - column - kLanes);
    store_some(first, target, load_some(first, target) + left);
    store_some(second, target + kLanes, load_some(second, target + kLanes) + right);
  }
};

// A panel holds 16 columns of the gate and the same 16 of `up`.
struct StoreSiluProduct {
  float* outputs;
  int num_columns;

  void operator()(int64_t row, int column, Floats gate, Floats up) const {
    store_some(first_lanes(num_columns - column / 2), outputs + row * num_columns + column / 2,
               silu(gate) * up);
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
    // Codes that are taken as they are can be multiplied as if they had 8 bits.
    if (matrix.bits == 4 && kCodesAreSigned)
      multiply_all<4>(panel, rows, first, end, column, epilogue);
    else
      multiply_all<8>(panel, rows, first, end, column, epilogue);
  });
}
