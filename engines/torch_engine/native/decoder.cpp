// The layers of a Llama decoder over a paged KV cache, for CPUs with AVX-512 VNNI or
// AVX2.
//
// Computes what `engines.torch_engine.model.LlamaDecoder`, the readable specification, computes,
// with quantised matrices. `cpu_decoder.py` owns all memory and calls this.

#include "attention.h"
#include "linear.h"

namespace {

struct Layer {
  const float* input_norm;
  Matrix qkv;
  Matrix attention_output;
  const float* mlp_norm;
  Matrix gate_up;  // in turn 16 outputs of the gate and 16 of `up`
  Matrix down;
};

struct Model {
  const Layer* layers;
  const float* embedding;  // (vocab_size, hidden_size)
  const float* final_norm;
  Matrix lm_head;
  const float* cosines;  // (max_model_len, head_dim / 2), and the sines
  const float* sines;
  int32_t hidden_size;
  int32_t intermediate_size;
  int32_t num_heads;
  float rms_norm_eps;
  KVCache cache;
};

struct Step {
  const int32_t* token_ids;  // (num_rows,)
  const int32_t* positions;  // (num_rows,)
  const int32_t* slots;      // (num_rows,): block * block_size_tokens + place
  const int32_t* tile_rows;  // (num_tiles,), see QueryTile
  const int32_t* tile_counts;
  const int32_t* tile_positions;
  const int32_t* tile_table_starts;
  const int32_t* tables;
  const int32_t* sampled_rows;  // (num_sampled,)
  int32_t num_rows;
  int32_t num_tiles;
  int32_t num_sampled;
};

struct Workspace {
  float* hidden;  // (num_rows, hidden_size)
  float* qkv;
  float* attention;
  float* product;  // (num_rows, intermediate_size)
  Activations activations;
  uint8_t* thread_memory;
  int64_t thread_bytes;
  int32_t num_threads;
};

void rms_norm(const float* row, const float* weight, int size, float eps, float* output) {
  Floats squares = zeros();
  for (int i = 0; i < size; i += kLanes) {
    const Floats numbers = load(row + i);
    squares = fma(numbers, numbers, squares);
  }
  const float mean = reduce_add(squares) / static_cast<float>(size);
  const Floats scale = all(1.0f / std::sqrt(mean + eps));
  for (int i = 0; i < size; i += kLanes)
    store(output + i, load(row + i) * scale * load(weight + i));
}

void rotate(float* head, const float* cosines, const float* sines, int head_dim) {
  const int half = head_dim / 2;
  for (int i = 0; i < half; i += kLanes) {
    const Mask mask = first_lanes(half - i);
    const Floats cosine = load_some(mask, cosines + i), sine = load_some(mask, sines + i);
    const Floats first = load_some(mask, head + i), second = load_some(mask, head + half + i);
    store_some(mask, head + i, fms(first, cosine, second * sine));
    store_some(mask, head + half + i, fma(second, cosine, first * sine));
  }
}

// Rotate a row's queries and keys; store its K and V.
template <class Number>
void rotate_and_store(const Model& model, const Step& step, int layer, int64_t row, float* qkv) {
  const KVCache& cache = model.cache;
  const int head_dim = cache.head_dim;
  const int64_t table = static_cast<int64_t>(step.positions[row]) * (head_dim / 2);
  for (int head = 0; head < model.num_heads + cache.num_kv_heads; ++head)
    rotate(qkv + head * head_dim, model.cosines + table, model.sines + table, head_dim);
  const int64_t block = step.slots[row] / cache.block_size_tokens;
  const int offset = step.slots[row] % cache.block_size_tokens;
  const float* source = qkv + model.num_heads * head_dim;
  for (int kv = 0; kv < 2; ++kv) {
    for (int head = 0; head < cache.num_kv_heads; ++head, source += head_dim) {
      Number* target =
          static_cast<Number*>(cache.blocks) + cache.place(block, layer, kv, head, offset);
      for (int d = 0; d < head_dim; d += kLanes) store(target + d, load(source + d));
    }
  }
}

template <class Number>
void run_layer(Team& team, const Model& model, const Step& step, const Workspace& work, int index,
               uint8_t* memory) {
  const Layer& layer = model.layers[index];
  const KVCache& cache = model.cache;
  const int hidden_size = model.hidden_size, num_rows = step.num_rows;
  const int query_size = model.num_heads * cache.head_dim, qkv_size = layer.qkv.num_outputs;
  const Activations& inputs = work.activations;
  float* normed = reinterpret_cast<float*>(memory);
  const auto norm = [&](const float* weight) {
    team.share(num_rows, [&](int64_t row) {
      rms_norm(work.hidden + row * hidden_size, weight, hidden_size, model.rms_norm_eps, normed);
      quantize_row(normed, hidden_size, row, inputs);
    });
  };
  const auto quantize = [&](const float* rows, int size) {
    team.share(num_rows, [&](int64_t row) { quantize_row(rows + row * size, size, row, inputs); });
  };
  norm(layer.input_norm);
  linear(team, layer.qkv, inputs, num_rows, memory, Store{work.qkv, qkv_size});
  team.share(num_rows, [&](int64_t row) {
    rotate_and_store<Number>(model, step, index, row, work.qkv + row * qkv_size);
  });
  // From the last one on: those at the end of a prompt see the most.
  const int64_t num_items = static_cast<int64_t>(step.num_tiles) * cache.num_kv_heads;
  team.take_turns(num_items, [&](int64_t turn) {
    const int item = static_cast<int>(num_items - 1 - turn);
    const int i = item / cache.num_kv_heads;
    const QueryTile tile{step.tile_rows[i], step.tile_counts[i], step.tile_positions[i],
                         step.tables + step.tile_table_starts[i]};
    attend<Number>(cache, index, item % cache.num_kv_heads, tile,
                   model.num_heads / cache.num_kv_heads, work.qkv, qkv_size, work.attention,
                   query_size, reinterpret_cast<float*>(memory));
  });
  quantize(work.attention, query_size);
  linear(team, layer.attention_output, inputs, num_rows, memory, AddTo{work.hidden, hidden_size});
  norm(layer.mlp_norm);
  linear(team, layer.gate_up, inputs, num_rows, memory,
         StoreSiluProduct{work.product, model.intermediate_size});
  quantize(work.product, model.intermediate_size);
  linear(team, layer.down, inputs, num_rows, memory, AddTo{work.hidden, hidden_size});
}

uint8_t* own_memory(const Workspace& work) {
  return work.thread_memory + omp_get_thread_num() * work.thread_bytes;
}

}  // namespace

extern "C" {

// Bytes of a thread's part of `Workspace::thread_memory`, a multiple of 64.
int64_t proserve_thread_bytes(int32_t max_inputs, int32_t head_dim, int32_t max_tile_rows) {
  const int64_t panel = panel_memory_bytes(max_inputs);
  const int64_t attention =
      attention_memory(head_dim, max_tile_rows) * static_cast<int64_t>(sizeof(float));
  return ((panel > attention ? panel : attention) + 4095) / 64 * 64;
}

void proserve_embed(const Model* model, const Step* step, const Workspace* work) {
  for (int64_t row = 0; row < step->num_rows; ++row)
    __builtin_memcpy(work->hidden + row * model->hidden_size,
                     model->embedding + static_cast<int64_t>(step->token_ids[row]) *
                                            model->hidden_size,
                     static_cast<size_t>(model->hidden_size) * sizeof(float));
}

// Run layers [first, end).
void proserve_run_layers(const Model* model, const Step* step, const Workspace* work,
                         int32_t first, int32_t end) {
  run_team(work->num_threads, [&](Team& team) {
    for (int layer = first; layer < end; ++layer) {
      if (model->cache.is_bfloat16)
        run_layer<KVBFloat16>(team, *model, *step, *work, layer, own_memory(*work));
      else
        run_layer<KVFloat32>(team, *model, *step, *work, layer, own_memory(*work));
    }
  });
}

// Write the logits of the sampled rows, (num_sampled, vocab_size), and the largest of every 32.
void proserve_logits(const Model* model, const Step* step, const Workspace* work, float* logits,
                     float* largest) {
  run_team(work->num_threads, [&](Team& team) {
    uint8_t* memory = own_memory(*work);
    float* normed = reinterpret_cast<float*>(memory);
    team.share(step->num_sampled, [&](int64_t i) {
      const int64_t row = step->sampled_rows[i];
      rms_norm(work->hidden + row * model->hidden_size, model->final_norm, model->hidden_size,
               model->rms_norm_eps, normed);
      quantize_row(normed, model->hidden_size, i, work->activations);
    });
    linear(team, model->lm_head, work->activations, step->num_sampled, memory,
           StoreWithLargest{Store{logits, model->lm_head.num_outputs}, largest,
                            model->lm_head.num_panels()});
  });
}

// Multiply quantised rows by one matrix, (num_rows, num_outputs): for tests of the format.
void proserve_linear(const Matrix* matrix, const float* rows, int32_t num_rows,
                     const Workspace* work, float* outputs) {
  run_team(work->num_threads, [&](Team& team) {
    team.share(num_rows, [&](int64_t row) {
      quantize_row(rows + row * matrix->num_inputs, matrix->num_inputs, row, work->activations);
    });
    linear(team, *matrix, work->activations, num_rows, own_memory(*work),
           Store{outputs, matrix->num_outputs});
  });
}

}  // extern "C"
