// Draws tokens: steps 4 to 8 of `orchestrator.sampling`, in the same integers.

#include <algorithm>
#include <vector>

#include "team.h"
#include "vectors.h"

namespace {

constexpr float kMaxWeight = 1099511627776.0f;  // 2 to the power of 40
constexpr int64_t kGroupScores = 32;            // whose largest one may be known

struct Row {
  bool is_greedy;
  float temperature;
  int64_t min_weight;
  int64_t top_k;  // 0 keeps all
  double top_p;
  double fraction;
};

// Some of a row's weights, in any order.
struct Candidates {
  int64_t* begin;
  int64_t* end;

  int64_t count() const { return end - begin; }
};

int64_t num_groups(int64_t num_scores) { return (num_scores + kGroupScores - 1) / kGroupScores; }

// Index of the first largest number; -1 if that is not finite, or any is NaN.
int64_t most_likely(const float* scores, int64_t size) {
  Floats largest = all(-std::numeric_limits<float>::infinity());
  bool has_nan = false;
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    const Floats numbers = load(scores + i);
    has_nan |= any(any_is_nan(numbers, numbers));
    largest = max(largest, numbers);
  }
  float best = reduce_max(largest);
  for (int64_t rest = i; rest < size; ++rest) {
    has_nan |= std::isnan(scores[rest]);
    best = std::max(best, scores[rest]);
  }
  if (has_nan || !std::isfinite(best)) return -1;
  const Floats wanted = all(best);
  for (i = 0; i + kLanes <= size; i += kLanes) {
    const Mask is_best = is_equal(load(scores + i), wanted);
    if (any(is_best)) return i + first_lane(is_best);
  }
  while (scores[i] != best) ++i;
  return i;
}

// Scores relative to the best one, divided by the temperature.
class Scaled {
 public:
  Scaled(float best, float temperature)
      : best_(all(best)),
        temperature_(all(temperature)),
        inverse_(all(1.0f / temperature)),
        lowest_(all(-1000.0f * temperature)),
        is_extreme_(temperature < 1e-20f || temperature > 1e20f) {}

  Floats operator()(Floats scores) const {
    const Floats relative = scores - best_;
    if (is_extreme_) return relative / temperature_;
    // An estimate, corrected by its remainder: a fifth of a division's time. What is far below the
    // best one has no weight, whatever it is.
    const Floats x = max(relative, lowest_);
    const Floats quotient = x * inverse_;
    return fma(fnma(quotient, temperature_, x), inverse_, quotient);
  }

 private:
  Floats best_, temperature_, inverse_, lowest_;
  bool is_extreme_;
};

// Weights relative to the best score's, which is 2 to the power of 40; small ones become 0. Returns
// their sum. Writes whole vectors, with zeros behind the last one.
int64_t weigh(const float* scores, int64_t size, float best, const Row& row, int64_t* weights) {
  const Scaled scaled(best, row.temperature);
  const Longs floor = all_longs(row.min_weight);
  const Floats impossible = all(-std::numeric_limits<float>::infinity());
  Longs sums = all_longs(0);
  for (int64_t i = 0; i < size; i += kLanes) {
    const Mask mask = first_lanes(size - i);
    const Floats own = select(mask, load_some(mask, scores + i), impossible);
    Longs halves[2];
    truncate(exp(scaled(own)) * all(kMaxWeight), halves);
    for (int half = 0; half < 2; ++half) {
      const Longs kept = at_least(halves[half], floor);
      store(weights + i + 8 * half, kept);
      sums = add_longs(sums, kept);
    }
  }
  return reduce_add_longs(sums);
}

// The sum of those that are at least `floor`; behind them are zeros up to a multiple of 8.
int64_t total_of(const int64_t* weights, int64_t size, int64_t floor) {
  Longs sums = all_longs(0);
  const Longs least = all_longs(floor);
  for (int64_t i = 0; i < size; i += 8)
    sums = add_longs(sums, at_least(load_longs(weights + i), least));
  return reduce_add_longs(sums);
}

// Collect weights of at least `bound`; up to 8 more places than there are weights are written to.
Candidates collect(const int64_t* weights, int64_t size, int64_t bound, int64_t* memory) {
  const Longs least = all_longs(bound);
  int64_t* next = memory;
  for (int64_t i = 0; i < size; i += 8)
    next += write_at_least(next, load_longs(weights + i), least);
  return {memory, next};
}

// What is left of a row's weights: those that are at least `floor`, and their sum.
struct Kept {
  int64_t floor;
  int64_t total;
};

// Weights in the order of their sizes, as far as their exponents and 5 more bits tell.
constexpr int kBuckets = 41 * 32;

int bucket_of(int64_t weight) {
  const int exponent = 63 - __builtin_clzll(static_cast<uint64_t>(weight));
  return exponent * 32 + static_cast<int>((weight << (62 - exponent) >> 57) & 31);
}

// Put those of a bucket first, the largest of them first; return their end.
int64_t* sort_bucket(const Candidates& candidates, int bucket) {
  int64_t* end = std::partition(candidates.begin, candidates.end, [&](int64_t weight) {
    return bucket_of(weight) == bucket;
  });
  std::sort(candidates.begin, end, std::greater<>());
  return end;
}

// Keep the `count` heaviest tokens, and who ties with the last of them.
Kept heaviest(const int64_t* weights, int64_t size, Kept kept, int64_t count, int64_t* memory) {
  const Candidates candidates = collect(weights, size, kept.floor, memory);
  if (candidates.count() <= count) return kept;
  int64_t counts[kBuckets] = {};
  for (const int64_t* i = candidates.begin; i < candidates.end; ++i) ++counts[bucket_of(*i)];
  int bucket = kBuckets - 1;
  while (count > counts[bucket]) count -= counts[bucket--];
  sort_bucket(candidates, bucket);
  const int64_t floor = candidates.begin[count - 1];
  return {floor, total_of(weights, size, floor)};
}

// Keep the smallest set of tokens that holds `top_p` of the mass, and who ties with its last. All
// tokens under (1 - top_p) * mass / size together weigh less than what the set leaves out.
Kept nucleus(const int64_t* weights, int64_t size, Kept kept, double top_p, int64_t* memory) {
  const auto mass = static_cast<double>(kept.total);
  const auto bound = static_cast<int64_t>(mass * (1 - top_p) / static_cast<double>(size));
  const Candidates candidates = collect(weights, size, std::max(bound, kept.floor), memory);
  int64_t sums[kBuckets] = {};
  for (const int64_t* i = candidates.begin; i < candidates.end; ++i) sums[bucket_of(*i)] += *i;
  const auto needed = static_cast<int64_t>(std::ceil(mass * top_p));
  int64_t sum = 0;
  int bucket = kBuckets - 1;
  while (bucket >= 0 && sum + sums[bucket] < needed) sum += sums[bucket--];
  if (bucket < 0) return kept;  // a mass that no sum reaches, by rounding: all stay
  // Only the order inside the bucket of the set's last one matters.
  const int64_t* end = sort_bucket(candidates, bucket);
  const int64_t* last = candidates.begin;
  while ((sum += *last) < needed) ++last;
  const int64_t floor = *last;
  while (++last != end && *last == floor) sum += floor;
  return {floor, sum};
}

// As `most_likely(scores)`, where the largest of every 32 scores are known.
int64_t most_likely(const float* scores, int64_t size, const float* largest) {
  const int64_t group = most_likely(largest, num_groups(size));
  if (group < 0) return -1;
  int64_t i = group * kGroupScores;
  while (scores[i] != largest[group]) ++i;
  return i;
}

int64_t draw(const float* scores, int64_t size, const float* largest, const Row& row,
             int64_t* weights, int64_t* memory) {
  const int64_t best =
      largest == nullptr ? most_likely(scores, size) : most_likely(scores, size, largest);
  if (best < 0 || row.is_greedy) return best;
  Kept kept{1, weigh(scores, size, scores[best], row, weights)};
  if (row.top_k > 0) kept = heaviest(weights, size, kept, row.top_k, memory);
  if (row.top_p < 1) kept = nucleus(weights, size, kept, row.top_p, memory);
  const auto exact = static_cast<int64_t>(static_cast<double>(kept.total) * row.fraction);
  int64_t target = std::min(exact, kept.total - 1);
  // Whole runs first: sums of integers have no order.
  constexpr int64_t kRun = 512;
  int64_t i = 0;
  for (; i + kRun <= size; i += kRun) {
    const int64_t run = total_of(weights + i, kRun, kept.floor);
    if (target < run) break;
    target -= run;
  }
  for (;; ++i) {
    if (weights[i] < kept.floor) continue;
    if (target < weights[i]) return i;
    target -= weights[i];
  }
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
    weights.resize(vocab_size + kLanes);
    candidates.resize(vocab_size + 8);
    team.take_turns(num_rows, [&](int64_t i) {
      const auto column = [&](int64_t index) { return parameters[index * num_rows + i]; };
      const Row row{column(0) > 0,
                    static_cast<float>(column(1)),
                    static_cast<int64_t>(column(2)),
                    static_cast<int64_t>(column(3)),
                    column(4),
                    column(5)};
      const float* own = largest == nullptr ? nullptr : largest + i * num_groups(vocab_size);
      token_ids[i] =
          draw(scores + i * vocab_size, vocab_size, own, row, weights.data(), candidates.data());
    });
  });
}

}  // extern "C"
