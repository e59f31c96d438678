// Attention over the paged KV cache, read where the block table says.
//
// Decodes and prompts run through the same code, 64 tokens of context at a time counted from the
// first one: what a token gets does not depend on how its prompt was cut, nor on its neighbours.

#pragma once

#include "vectors.h"

constexpr int kChunkVectors = 4;
constexpr int kChunkTokens = kChunkVectors * kLanes;
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

// The scores of `kRows` queries and the chunk's first `kVectors` * 16 tokens.
template <int kRows, int kVectors>
inline void score(const float* queries, const float* keys, int head_dim,
                  Floats (&scores)[kRows][kVectors]) {
  constexpr int kAtOnce = vectors_at_once(kRows, kVectors);
#pragma GCC unroll 4
  for (int first = 0; first < kVectors; first += kAtOnce) {
    Floats sums[kRows][kAtOnce];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kAtOnce; ++v) sums[r][v] = zeros();
    for (int d = 0; d < head_dim; ++d) {
      Floats key[kAtOnce];
#pragma GCC unroll 4
      for (int v = 0; v < kAtOnce; ++v)
        key[v] = load(keys + d * kChunkTokens + (first + v) * kLanes);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const Floats query = all(queries[r * head_dim + d]);
#pragma GCC unroll 4
        for (int v = 0; v < kAtOnce; ++v) sums[r][v] = fma(query, key[v], sums[r][v]);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kAtOnce; ++v) scores[r][first + v] = sums[r][v];
  }
}

template <int kRows, int kVectors, class Number>
inline void accumulate(const float* weights, const float* corrections, const Number* const* values,
                       int num_tokens, int head_dim, float* outputs) {
  for (int d = 0; d < head_dim; d += kVectors * kLanes) {
    Floats sums[kRows][kVectors];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v)
        sums[r][v] = load(outputs + r * head_dim + d + v * kLanes) * all(corrections[r]);
    for (int t = 0; t < num_tokens; ++t) {
      Floats value[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) value[v] = load(values[t] + d + v * kLanes);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const Floats weight = all(weights[r * kChunkTokens + t]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sums[r][v] = fma(weight, value[v], sums[r][v]);
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
  int num_rows;
  int group_size;
  int position;  // of the first token
  int head_dim;
  float* keys;     // (head_dim, 64)
  float* values;   // (64, head_dim)
  float* queries;  // (rows, head_dim), scaled
  float* outputs;  // (rows, head_dim), not yet divided by `sums`
  float* weights;  // (rows, 64)
  float* largest;  // (rows,)
  float* sums;     // (rows,)
};

// Up to 64 tokens of context: K is in the tile's memory, V where `values` say.
template <class Number>
struct Chunk {
  int first;  // position of its first token
  int num_tokens;
  const Number* values[kChunkTokens];
};

// Turn a row's scores into weights; returns by what its outputs so far are to be multiplied.
template <int kVectors>
inline float weigh(const TileState& state, int row, int first, Floats (&scores)[kVectors]) {
  const int own = state.position + row / state.group_size;
  if (first + kVectors * kLanes > own + 1) {
    const Floats hidden = all(-std::numeric_limits<float>::infinity());
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v)
      scores[v] = select(first_lanes(own + 1 - first - v * kLanes), scores[v], hidden);
  }
  Floats most = scores[0];
#pragma GCC unroll 4
  for (int v = 1; v < kVectors; ++v) most = max(most, scores[v]);
  const float before = state.largest[row], chunk_largest = reduce_max(most);
  const float largest = chunk_largest > before ? chunk_largest : before;
  // Vectors left out would add zeros: the sum has the same bits without them.
  Floats pairs[2] = {zeros(), zeros()};
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    const Floats weights = exp(scores[v] - all(largest));
    store(state.weights + row * kChunkTokens + v * kLanes, weights);
    pairs[v / 2] = pairs[v / 2] + weights;
  }
  // e to the power of 0 is exactly 1, and most chunks do not raise the maximum.
  const float correction = largest == before ? 1.0f : first_of(exp(all(before - largest)));
  state.sums[row] = state.sums[row] * correction + reduce_add(pairs[0] + pairs[1]);
  state.largest[row] = largest;
  return correction;
}

template <int kRows, int kVectors, class Number>
inline void attend_rows(const TileState& state, int row, const Chunk<Number>& chunk) {
  const int head_dim = state.head_dim;
  Floats scores[kRows][kVectors];
  score<kRows, kVectors>(state.queries + row * head_dim, state.keys, head_dim, scores);
  float corrections[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
    corrections[r] = weigh<kVectors>(state, row + r, chunk.first, scores[r]);
  float* outputs = state.outputs + row * head_dim;
  const float* weights = state.weights + row * kChunkTokens;
  constexpr int kAtOnce = vectors_at_once(kRows, 4);
  if (head_dim % (kAtOnce * kLanes) == 0)
    accumulate<kRows, kAtOnce>(weights, corrections, chunk.values, chunk.num_tokens, head_dim,
                               outputs);
  else
    accumulate<kRows, 1>(weights, corrections, chunk.values, chunk.num_tokens, head_dim, outputs);
}

// All rows of a tile on the first `kVectors` * 16 tokens of a chunk.
template <int kVectors, class Number>
inline void attend_vectors(const TileState& state, const Chunk<Number>& chunk) {
  int row = 0;
  for (; row + kMaxRows <= state.num_rows; row += kMaxRows)
    attend_rows<kMaxRows, kVectors>(state, row, chunk);
  for (; row + 3 <= state.num_rows; row += 3) attend_rows<3, kVectors>(state, row, chunk);
  for (; row < state.num_rows; ++row) attend_rows<1, kVectors>(state, row, chunk);
}

template <class Number>
inline void attend_chunk(const TileState& state, const Chunk<Number>& chunk) {
  switch ((chunk.num_tokens + kLanes - 1) / kLanes) {
    case 1: attend_vectors<1>(state, chunk); break;
    case 2: attend_vectors<2>(state, chunk); break;
    case 3: attend_vectors<3>(state, chunk); break;
    default: attend_vectors<4>(state, chunk); break;
  }
}

// Attention of one tile under one KV head: `qkv` is (num_rows, qkv_size) with rotated queries
// first, `outputs` is (num_rows, num_heads * head_dim).
template <class Number>
inline void attend(const KVCache& cache, int layer, int kv_head, const QueryTile& tile,
                   int group_size, const float* qkv, int qkv_size, float* outputs,
                   int output_size, float* memory) {
  const auto* blocks = static_cast<const Number*>(cache.blocks);
  const int head_dim = cache.head_dim, num_rows = tile.count * group_size;
  TileState state{num_rows, group_size, tile.position, head_dim};
  state.keys = memory;
  state.values = state.keys + kChunkTokens * head_dim;
  state.queries = state.values + kChunkTokens * head_dim;
  state.outputs = state.queries + num_rows * head_dim;
  state.weights = state.outputs + num_rows * head_dim;
  state.largest = state.weights + num_rows * kChunkTokens;
  state.sums = state.largest + num_rows;
  const Floats scale = all(1.0f / std::sqrt(static_cast<float>(head_dim)));
  for (int row = 0; row < num_rows; ++row) {
    const int head = kv_head * group_size + row % group_size;
    const float* query = qkv + (tile.row + row / group_size) * qkv_size + head * head_dim;
    for (int d = 0; d < head_dim; d += kLanes) {
      store(state.queries + row * head_dim + d, load(query + d) * scale);
      store(state.outputs + row * head_dim + d, zeros());
    }
    // Finite, so that no chunk subtracts infinities; any score is larger.
    state.largest[row] = std::numeric_limits<float>::lowest();
    state.sums[row] = 0.0f;
  }
  const int num_context = tile.position + tile.count, block_size = cache.block_size_tokens;
  for (int first = 0; first < num_context; first += kChunkTokens) {
    Chunk<Number> chunk;
    chunk.first = first;
    chunk.num_tokens = num_context - first < kChunkTokens ? num_context - first : kChunkTokens;
    const Number* keys[kChunkTokens];
    int index = first / block_size, offset = first % block_size;
    for (int t = 0; t < chunk.num_tokens; ++t) {
      keys[t] = blocks + cache.place(tile.table[index], layer, 0, kv_head, offset);
      chunk.values[t] = blocks + cache.place(tile.table[index], layer, 1, kv_head, offset);
      if (++offset == block_size) {
        offset = 0;
        ++index;
      }
    }
    // Behind the last token, the last one again: finite numbers that the mask hides.
    const int num_vectors = (chunk.num_tokens + kLanes - 1) / kLanes;
    for (int t = chunk.num_tokens; t < num_vectors * kLanes; ++t) keys[t] = keys[t - 1];
    for (int v = 0; v < num_vectors; ++v) {
      for (int d = 0; d < head_dim; d += kLanes) {
        Floats square[kLanes];
#pragma GCC unroll 16
        for (int t = 0; t < kLanes; ++t) square[t] = load(keys[v * kLanes + t] + d);
        transpose(square);
#pragma GCC unroll 16
        for (int t = 0; t < kLanes; ++t)
          store(state.keys + (d + t) * kChunkTokens + v * kLanes, square[t]);
      }
    }
    if (num_rows <= kMaxRows) {
      attend_chunk(state, chunk);
      continue;
    }
    // Many rows: convert to float once for all.
    Chunk<float> converted;
    converted.first = first;
    converted.num_tokens = chunk.num_tokens;
    for (int t = 0; t < chunk.num_tokens; ++t) {
      float* target = state.values + t * head_dim;
      for (int d = 0; d < head_dim; d += kLanes) store(target + d, load(chunk.values[t] + d));
      converted.values[t] = target;
    }
    attend_chunk(state, converted);
  }
  for (int row = 0; row < num_rows; ++row) {
    const int head = kv_head * group_size + row % group_size;
    float* output = outputs + (tile.row + row / group_size) * output_size + head * head_dim;
    const Floats sum = all(state.sums[row]);
    for (int d = 0; d < head_dim; d += kLanes)
      store(output + d, load(state.outputs + row * head_dim + d) / sum);
  }
}
