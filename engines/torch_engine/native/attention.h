// Attention over the paged KV cache, read where the block table says.
//
// Decodes and prompts run through the same code, 16 tokens of context at a time counted from the
// first one: what a token gets does not depend on how its prompt was cut, nor on its neighbours.

#pragma once

#include "vectors.h"

constexpr int kChunkTokens = kLanes;
constexpr int kMaxRows = 4;  // query rows that share what is loaded of K and V

// (num_blocks, num_layers, 2, num_kv_heads, block_size_tokens, head_dim)
struct KVCache {
  void* blocks;
  int32_t is_bfloat16;
  int32_t num_layers;
  int32_t num_kv_heads;
  int32_t block_size_tokens;
  int32_t head_dim;  // a multiple of 16

  // Number of the first element of a token's K (0) or V (1).
  int64_t place(int64_t block, int layer, int key_or_value, int head, int64_t offset) const {
    const int64_t head_row = ((block * num_layers + layer) * 2 + key_or_value) * num_kv_heads + head;
    return (head_row * block_size_tokens + offset) * head_dim;
  }
};

// Neighbouring new tokens of one request.
struct QueryTile {
  int64_t row;
  int count;
  int position;  // of the first one
  const int32_t* table;
};

// One thread's memory, in floats.
inline int64_t attention_memory(int head_dim, int max_tile_rows) {
  return static_cast<int64_t>(2 * kChunkTokens + 2 * max_tile_rows) * head_dim +
         static_cast<int64_t>(2 + kChunkTokens) * max_tile_rows;
}

template <int kRows>
inline void score(const float* queries, const float* keys, int head_dim, __m512 (&scores)[kRows]) {
  __m512 odd[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) scores[r] = odd[r] = _mm512_setzero_ps();
  for (int d = 0; d < head_dim; d += 2) {
    const __m512 first = load(keys + d * kLanes), second = load(keys + (d + 1) * kLanes);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      scores[r] = _mm512_fmadd_ps(_mm512_set1_ps(queries[r * head_dim + d]), first, scores[r]);
      odd[r] = _mm512_fmadd_ps(_mm512_set1_ps(queries[r * head_dim + d + 1]), second, odd[r]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) scores[r] = _mm512_add_ps(scores[r], odd[r]);
}

template <int kRows, int kVectors, class Number>
inline void accumulate(const float* weights, const float* corrections, const Number* const* values,
                       int num_tokens, int head_dim, float* outputs) {
  for (int d = 0; d < head_dim; d += kVectors * kLanes) {
    __m512 sums[kRows][kVectors];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v)
        sums[r][v] = _mm512_mul_ps(load(outputs + r * head_dim + d + v * kLanes),
                                   _mm512_set1_ps(corrections[r]));
    for (int t = 0; t < num_tokens; ++t) {
      __m512 value[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) value[v] = load(values[t] + d + v * kLanes);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const __m512 weight = _mm512_set1_ps(weights[r * kChunkTokens + t]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sums[r][v] = _mm512_fmadd_ps(weight, value[v], sums[r][v]);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) store(outputs + r * head_dim + d + v * kLanes, sums[r][v]);
  }
}

// A tile's query rows: the heads of a group for each of its tokens, token by token.
struct TileState {
  float* keys;     // (head_dim, 16)
  float* values;   // (16, head_dim)
  float* queries;  // (rows, head_dim), scaled
  float* outputs;  // (rows, head_dim), not yet divided by `sums`
  float* weights;  // (rows, 16)
  float* largest;  // (rows,)
  float* sums;     // (rows,)
};

template <int kRows, class Value>
inline void attend_chunk(const TileState& state, int first_row, int group_size, int tile_position,
                         int chunk, const Value* const* values, int num_tokens, int head_dim) {
  __m512 scores[kRows];
  score<kRows>(state.queries + first_row * head_dim, state.keys, head_dim, scores);
  float corrections[kRows];
  const __m512i positions = _mm512_add_epi32(
      _mm512_set1_epi32(chunk * kChunkTokens),
      _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    const int row = first_row + r;
    const __m512i own = _mm512_set1_epi32(tile_position + row / group_size);
    const __mmask16 is_future = _mm512_cmpgt_epi32_mask(positions, own);
    const __m512 lowest = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
    scores[r] = _mm512_mask_mov_ps(scores[r], is_future, lowest);
    const float before = state.largest[row];
    const float chunk_largest = _mm512_reduce_max_ps(scores[r]);
    const float largest = chunk_largest > before ? chunk_largest : before;
    const __m512 weights = exp(_mm512_sub_ps(scores[r], _mm512_set1_ps(largest)));
    store(state.weights + row * kChunkTokens, weights);
    // e to the power of 0 is exactly 1, and most chunks do not raise the maximum.
    corrections[r] =
        largest == before ? 1.0f : _mm512_cvtss_f32(exp(_mm512_set1_ps(before - largest)));
    state.sums[row] = state.sums[row] * corrections[r] + _mm512_reduce_add_ps(weights);
    state.largest[row] = largest;
  }
  float* outputs = state.outputs + first_row * head_dim;
  const float* weights = state.weights + first_row * kChunkTokens;
  if (head_dim % (4 * kLanes) == 0)
    accumulate<kRows, 4>(weights, corrections, values, num_tokens, head_dim, outputs);
  else
    accumulate<kRows, 1>(weights, corrections, values, num_tokens, head_dim, outputs);
}

// All rows of a tile on one chunk.
template <class Value>
inline void attend_rows(const TileState& state, int num_rows, int group_size, int tile_position,
                        int chunk, const Value* const* values, int num_tokens, int head_dim) {
  int row = 0;
  for (; row + kMaxRows <= num_rows; row += kMaxRows)
    attend_chunk<kMaxRows>(state, row, group_size, tile_position, chunk, values, num_tokens,
                           head_dim);
  for (; row + 3 <= num_rows; row += 3)
    attend_chunk<3>(state, row, group_size, tile_position, chunk, values, num_tokens, head_dim);
  for (; row < num_rows; ++row)
    attend_chunk<1>(state, row, group_size, tile_position, chunk, values, num_tokens, head_dim);
}

// Attention of one tile under one KV head: `qkv` is (num_rows, qkv_size) with rotated queries
// first, `outputs` is (num_rows, num_heads * head_dim).
template <class Number>
inline void attend(const KVCache& cache, int layer, int kv_head, const QueryTile& tile,
                   int group_size, const float* qkv, int qkv_size, float* outputs,
                   int output_size, float* memory) {
  const auto* blocks = static_cast<const Number*>(cache.blocks);
  const int head_dim = cache.head_dim, num_rows = tile.count * group_size;
  TileState state{};
  state.keys = memory;
  state.values = state.keys + kChunkTokens * head_dim;
  state.queries = state.values + kChunkTokens * head_dim;
  state.outputs = state.queries + num_rows * head_dim;
  state.weights = state.outputs + num_rows * head_dim;
  state.largest = state.weights + num_rows * kChunkTokens;
  state.sums = state.largest + num_rows;
  const __m512 scale = _mm512_set1_ps(1.0f / std::sqrt(static_cast<float>(head_dim)));
  for (int row = 0; row < num_rows; ++row) {
    const int head = kv_head * group_size + row % group_size;
    const float* query = qkv + (tile.row + row / group_size) * qkv_size + head * head_dim;
    for (int d = 0; d < head_dim; d += kLanes) {
      store(state.queries + row * head_dim + d, _mm512_mul_ps(load(query + d), scale));
      store(state.outputs + row * head_dim + d, _mm512_setzero_ps());
    }
    // Finite, so that no chunk subtracts infinities; any score is larger.
    state.largest[row] = std::numeric_limits<float>::lowest();
    state.sums[row] = 0.0f;
  }
  const int num_context = tile.position + tile.count;
  for (int chunk = 0; chunk * kChunkTokens < num_context; ++chunk) {
    const int first = chunk * kChunkTokens;
    const int num_tokens = num_context - first < kChunkTokens ? num_context - first : kChunkTokens;
    const Number *keys[kChunkTokens], *values[kChunkTokens];
    for (int t = 0; t < kChunkTokens; ++t) {
      // Behind the last token, the last one again: finite numbers that the mask hides.
      const int position = first + (t < num_tokens ? t : num_tokens - 1);
      const int64_t block = tile.table[position / cache.block_size_tokens];
      const int offset = position % cache.block_size_tokens;
      keys[t] = blocks + cache.place(block, layer, 0, kv_head, offset);
      values[t] = blocks + cache.place(block, layer, 1, kv_head, offset);
    }
    for (int d = 0; d < head_dim; d += kLanes) {
      __m512 square[kLanes];
#pragma GCC unroll 16
      for (int t = 0; t < kLanes; ++t) square[t] = load(keys[t] + d);
      transpose(square);
#pragma GCC unroll 16
      for (int t = 0; t < kLanes; ++t) store(state.keys + (d + t) * kLanes, square[t]);
    }
    if (num_rows <= kMaxRows) {
      attend_rows(state, num_rows, group_size, tile.position, chunk, values, num_tokens, head_dim);
      continue;
    }
    // Many rows: convert to float once for all.
    const float* converted[kChunkTokens];
    for (int t = 0; t < num_tokens; ++t) {
      float* target = state.values + t * head_dim;
      for (int d = 0; d < head_dim; d += kLanes) store(target + d, load(values[t] + d));
      converted[t] = target;
    }
    attend_rows(state, num_rows, group_size, tile.position, chunk, converted, num_tokens, head_dim);
  }
  for (int row = 0; row < num_rows; ++row) {
    const int head = kv_head * group_size + row % group_size;
    float* output = outputs + (tile.row + row / group_size) * output_size + head * head_dim;
    const __m512 sum = _mm512_set1_ps(state.sums[row]);
    for (int d = 0; d < head_dim; d += kLanes)
      store(output + d, _mm512_div_ps(load(state.outputs + row * head_dim + d), sum));
  }
}
