// Draws tokens: steps 4 to 8 of `orchestrator.sampling`, in the same integers.

#include <algorithm>
#include <vector>

#include "team.h"
#include "vectors.h"

namespace {

constexpr float kMaxWeight = 1099511627776.0f;  // 2 to the power of 40

struct Row {
  bool is_greedy;
  float temperature;
  int64_t min_weight;
  int64_t top_k;  // 0 keeps all
  double top_p;
  double fraction;
};

// Index of the first largest number; -1 if that is not finite, or any is NaN.
int64_t most_likely(const float* scores, int64_t size) {
  __m512 largest = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  __mmask16 has_nan = 0;
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    const __m512 numbers = load(scores + i);
    has_nan |= _mm512_cmp_ps_mask(numbers, numbers, _CMP_UNORD_Q);
    largest = _mm512_max_ps(largest, numbers);
  }
  float best = _mm512_reduce_max_ps(largest);
  for (int64_t rest = i; rest < size; ++rest) {
    if (std::isnan(scores[rest])) has_nan = 1;
    best = std::max(best, scores[rest]);
  }
  if (has_nan || !std::isfinite(best)) return -1;
  const __m512 wanted = _mm512_set1_ps(best);
  for (i = 0; i + kLanes <= size; i += kLanes) {
    const __mmask16 is_best = _mm512_cmp_ps_mask(load(scores + i), wanted, _CMP_EQ_OQ);
    if (is_best) return i + __builtin_ctz(is_best);
  }
  while (scores[i] != best) ++i;
  return i;
}

// Weights relative to the best score's, which is 2 to the power of 40; small ones become 0.
void weigh(const float* scores, int64_t size, float best, const Row& row, int64_t* weights) {
  const __m512 top = _mm512_set1_ps(best), temperature = _mm512_set1_ps(row.temperature);
  const __m512i floor = _mm512_set1_epi64(row.min_weight);
  for (int64_t i = 0; i < size; i += kLanes) {
    const int64_t left = size - i;
    const __mmask16 mask = left >= kLanes ? 0xFFFF : static_cast<__mmask16>((1 << left) - 1);
    const __m512 relative = _mm512_sub_ps(_mm512_maskz_loadu_ps(mask, scores + i), top);
    const __m512 weight = _mm512_mul_ps(exp(_mm512_div_ps(relative, temperature)),
                                        _mm512_set1_ps(kMaxWeight));
    const __m256 halves[2] = {_mm512_castps512_ps256(weight), _mm512_extractf32x8_ps(weight, 1)};
    for (int half = 0; half < 2; ++half) {
      const __m512i whole = _mm512_cvttps_epi64(halves[half]);
      const __mmask8 stays = _mm512_cmpge_epi64_mask(whole, floor);
      _mm512_mask_storeu_epi64(weights + i + 8 * half, static_cast<__mmask8>(mask >> (8 * half)),
                               _mm512_maskz_mov_epi64(stays, whole));
    }
  }
}

int64_t total_of(const int64_t* weights, int64_t size) {
  __m512i sums = _mm512_setzero_si512();
  int64_t i = 0;
  for (; i + 8 <= size; i += 8) sums = _mm512_add_epi64(sums, _mm512_loadu_si512(weights + i));
  int64_t total = _mm512_reduce_add_epi64(sums);
  for (; i < size; ++i) total += weights[i];
  return total;
}

// Weights of at least `bound`, in any order.
void collect(const int64_t* weights, int64_t size, int64_t bound, std::vector<int64_t>& found) {
  found.resize(size + 8);
  int64_t count = 0, i = 0;
  const __m512i least = _mm512_set1_epi64(bound);
  for (; i + 8 <= size; i += 8) {
    const __m512i eight = _mm512_loadu_si512(weights + i);
    const __mmask8 stays = _mm512_cmpge_epi64_mask(eight, least);
    if (!stays) continue;
    _mm512_mask_compressstoreu_epi64(found.data() + count, stays, eight);
    count += __builtin_popcount(stays);
  }
  for (; i < size; ++i)
    if (weights[i] >= bound) found[count++] = weights[i];
  found.resize(count);
}

void keep(int64_t* weights, int64_t size, int64_t floor) {
  for (int64_t i = 0; i < size; ++i) weights[i] = weights[i] < floor ? 0 : weights[i];
}

// The smallest weight inside the smallest set of tokens that holds `top_p` of the mass. All tokens
// under (1 - top_p) * mass / size together weigh less than what the set leaves out.
int64_t nucleus_floor(const int64_t* weights, int64_t size, double top_p,
                      std::vector<int64_t>& candidates) {
  const auto mass = static_cast<double>(total_of(weights, size));
  const auto bound = static_cast<int64_t>(mass * (1 - top_p) / static_cast<double>(size));
  collect(weights, size, std::max<int64_t>(bound, 1), candidates);
  std::sort(candidates.begin(), candidates.end(), std::greater<>());
  const auto needed = static_cast<int64_t>(std::ceil(mass * top_p));
  int64_t sum = 0;
  for (const int64_t weight : candidates) {
    sum += weight;
    if (sum >= needed) return weight;
  }
  return 0;  // a mass that no sum reaches, by rounding: all stay
}

// As `most_likely(scores)`, where the largest of every 32 scores are known.
int64_t most_likely(const float* scores, int64_t size, const float* largest) {
  constexpr int64_t kRun = 32;
  const int64_t run = most_likely(largest, (size + kRun - 1) / kRun);
  if (run < 0) return -1;
  int64_t i = run * kRun;
  while (scores[i] != largest[run]) ++i;
  return i;
}

int64_t draw(const float* scores, int64_t size, const float* largest, const Row& row,
             int64_t* weights, std::vector<int64_t>& candidates) {
  const int64_t best =
      largest == nullptr ? most_likely(scores, size) : most_likely(scores, size, largest);
  if (best < 0 || row.is_greedy) return best;
  weigh(scores, size, scores[best], row, weights);
  if (row.top_k > 0 && row.top_k < size) {
    collect(weights, size, 0, candidates);
    const auto place = candidates.begin() + (row.top_k - 1);
    std::nth_element(candidates.begin(), place, candidates.end(), std::greater<>());
    keep(weights, size, *place);
  }
  if (row.top_p < 1) keep(weights, size, nucleus_floor(weights, size, row.top_p, candidates));
  const int64_t total = total_of(weights, size);
  const auto exact = static_cast<int64_t>(static_cast<double>(total) * row.fraction);
  int64_t target = std::min(exact, total - 1);
  // Whole runs first: sums of integers have no order.
  constexpr int64_t kRun = 512;
  int64_t i = 0;
  for (; i + kRun <= size; i += kRun) {
    const int64_t run = total_of(weights + i, kRun);
    if (target < run) break;
    target -= run;
  }
  while (target >= weights[i]) target -= weights[i++];
  return i;
}

}  // namespace

extern "C" {

// `parameters` is (6, num_rows): is_greedy, temperature, min_weight, top_k, top_p, fraction.
// `largest` is null, or holds the largest of every 32 scores, (num_rows, vocab_size / 32) rounded up.
// Writes a token for each row; -1 where the largest score is not finite.
void proserve_draw(const float* scores, int64_t num_rows, int64_t vocab_size,
                   const float* largest, const double* parameters, int32_t num_threads, int64_t* token_ids) {
  run_team(num_threads, [&](Team& team) {
    // Kept from call to call: memory this large is given back and cleared again each time.
    static thread_local std::vector<int64_t> weights, candidates;
    weights.resize(vocab_size);
    team.take_turns(num_rows, [&](int64_t i) {
      const auto column = [&](int64_t index) { return parameters[index * num_rows + i]; };
      const Row row{column(0) > 0,
                    static_cast<float>(column(1)),
                    static_cast<int64_t>(column(2)),
                    static_cast<int64_t>(column(3)),
                    column(4),
                    column(5)};
      const float* own = largest == nullptr ? nullptr : largest + i * ((vocab_size + 31) / 32);
      token_ids[i] =
          draw(scores + i * vocab_size, vocab_size, own, row, weights.data(), candidates);
    });
  });
}

}  // extern "C"
