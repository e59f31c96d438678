// Draws tokens: steps 4 to 8 of `orchestrator.sampling`, in the same integers.

#include <algorithm>
#include <functional>
#include <iterator>
#include <vector>

#include "team.h"
#include "vectors.h"

namespace {

constexpr float kMaxWeight = 1099511627776.0f;  // 2 to the power of 40
constexpr int64_t kRun = 512;  // scores whose weights are summed, or computed again, together

struct Row {
  bool is_greedy;
  float temperature;
  int64_t min_weight;
  int64_t top_k;  // 0 keeps all
  double top_p;
  double fraction;
};

using Weights = std::vector<int64_t>;

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

// Weights relative to the best score's, which is 2 to the power of 40; small ones become 0.
class Weigher {
 public:
  Weigher(const float* scores, int64_t size, float best, const Row& row)
      : scores_(scores),
        size_(size),
        scaled_(best, row.temperature),
        least_(all_longs(row.min_weight)) {}

  int64_t size() const { return size_; }
  int64_t num_runs() const { return (size_ + kRun - 1) / kRun; }

  // Of the 16 scores from `i` on; zeros behind the last.
  void operator()(int64_t i, Longs (&halves)[2]) const {
    const Mask mask = first_lanes(size_ - i);
    const Floats impossible = all(-std::numeric_limits<float>::infinity());
    const Floats own = select(mask, load_some(mask, scores_ + i), impossible);
    truncate(exp(scaled_(own)) * all(kMaxWeight), halves);
    for (Longs& half : halves) half = at_least(half, least_);
  }

  // Of a run's scores; zeros behind the last.
  void weigh_run(int64_t run, int64_t (&weights)[kRun]) const {
    for (int64_t i = 0; i < kRun; i += kLanes) {
      Longs halves[2];
      (*this)(run * kRun + i, halves);
      store(weights + i, halves[0]);
      store(weights + i + 8, halves[1]);
    }
  }

 private:
  const float* scores_;
  int64_t size_;
  Scaled scaled_;
  Longs least_;
};

// The sum of those that are at least `floor`; behind them are zeros up to a multiple of 8.
int64_t total_of(const int64_t* weights, int64_t size, int64_t floor) {
  Longs sums = all_longs(0);
  const Longs least = all_longs(floor);
  for (int64_t i = 0; i < size; i += 8)
    sums = add_longs(sums, at_least(load_longs(weights + i), least));
  return reduce_add_longs(sums);
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

// Those weights that may stay, in the order of their tokens.
struct Candidates {
  Weights weights;  // and zeros behind them, to a multiple of 8
  int64_t count;
  Weights run_ends;  // how many there are up to the end of each run
  Weights scratch;

  // Take what weighs at least `least`; returns the sum of all weights.
  int64_t collect(const Weigher& weigh, int64_t least) {
    weights.resize(weigh.size() + 2 * kLanes);
    run_ends.clear();
    count = 0;
    const Longs floor = all_longs(least);
    Longs sums = all_longs(0);
    for (int64_t run = 0; run < weigh.num_runs(); ++run) {
      const int64_t end = std::min((run + 1) * kRun, weigh.size());
      for (int64_t i = run * kRun; i < end; i += kLanes) {
        Longs halves[2];
        weigh(i, halves);
        for (const Longs& half : halves) {
          sums = add_longs(sums, half);
          count += write_at_least(weights.data() + count, half, floor);
        }
      }
      run_ends.push_back(count);
    }
    std::fill_n(weights.begin() + count, 8, 0);
    return reduce_add_longs(sums);
  }

  // Those of a bucket, the largest first.
  const Weights& sorted_bucket(int bucket) {
    scratch.clear();
    std::copy_if(weights.begin(), weights.begin() + count, std::back_inserter(scratch),
                 [&](int64_t weight) { return bucket_of(weight) == bucket; });
    std::sort(scratch.begin(), scratch.end(), std::greater<>());
    return scratch;
  }
};

// Keep the `count` heaviest tokens, and who ties with the last of them.
Kept heaviest(Candidates& candidates, Kept kept, int64_t count) {
  if (candidates.count <= count) return kept;
  const int64_t* weights = candidates.weights.data();
  int64_t counts[kBuckets] = {};
  for (int64_t i = 0; i < candidates.count; ++i) ++counts[bucket_of(weights[i])];
  int bucket = kBuckets - 1;
  while (count > counts[bucket]) count -= counts[bucket--];
  const int64_t floor = candidates.sorted_bucket(bucket)[count - 1];
  return {floor, total_of(weights, candidates.count, floor)};
}

// All tokens lighter than this together weigh less than what the nucleus leaves out.
int64_t nucleus_bound(double mass, double top_p, int64_t size) {
  return static_cast<int64_t>(mass * (1 - top_p) / static_cast<double>(size));
}

// Keep the smallest set of tokens that holds `top_p` of the mass, and who ties with its last.
Kept nucleus(Candidates& candidates, Kept kept, double top_p, int64_t size) {
  const auto mass = static_cast<double>(kept.total);
  const int64_t bound = std::max(nucleus_bound(mass, top_p, size), kept.floor);
  int64_t sums[kBuckets] = {};
  for (int64_t i = 0; i < candidates.count; ++i) {
    const int64_t weight = candidates.weights[i];
    if (weight >= bound) sums[bucket_of(weight)] += weight;
  }
  const auto needed = static_cast<int64_t>(std::ceil(mass * top_p));
  int64_t sum = 0;
  int bucket = kBuckets - 1;
  while (bucket >= 0 && sum + sums[bucket] < needed) sum += sums[bucket--];
  if (bucket < 0) return kept;  // a mass that no sum reaches, by rounding: all stay
  // Only the order inside the bucket of the set's last one matters.
  const Weights& ordered = candidates.sorted_bucket(bucket);
  auto last = ordered.begin();
  while ((sum += *last) < needed) ++last;
  const int64_t floor = *last;
  while (++last != ordered.end() && *last == floor) sum += floor;
  return {floor, sum};
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

// The part of a row's mass at which its token lies.
int64_t target_of(int64_t total, double fraction) {
  const auto exact = static_cast<int64_t>(static_cast<double>(total) * fraction);
  return std::min(exact, total - 1);
}

// Draw from all tokens.
int64_t draw_from_all(const Weigher& weigh, double fraction, Weights& run_sums) {
  run_sums.clear();
  int64_t total = 0;
  for (int64_t run = 0; run < weigh.num_runs(); ++run) {
    const int64_t end = std::min((run + 1) * kRun, weigh.size());
    Longs sums = all_longs(0);
    for (int64_t i = run * kRun; i < end; i += kLanes) {
      Longs halves[2];
      weigh(i, halves);
      sums = add_longs(add_longs(sums, halves[0]), halves[1]);
    }
    run_sums.push_back(reduce_add_longs(sums));
    total += run_sums.back();
  }
  int64_t target = target_of(total, fraction), run = 0;
  while (target >= run_sums[run]) target -= run_sums[run++];
  int64_t weights[kRun], i = 0;
  weigh.weigh_run(run, weights);
  while (target >= weights[i]) target -= weights[i++];
  return run * kRun + i;
}

// Draw from the candidates that are kept; `least` is what a candidate weighs at least.
int64_t draw_from(const Candidates& candidates, const Weigher& weigh, int64_t least,
                  const Kept& kept, double fraction) {
  int64_t target = target_of(kept.total, fraction), place = 0;
  const int64_t* found = candidates.weights.data();
  // Whole runs first: sums of integers have no order.
  for (; place + kRun <= candidates.count; place += kRun) {
    const int64_t sum = total_of(found + place, kRun, kept.floor);
    if (target < sum) break;
    target -= sum;
  }
  for (;; ++place) {
    if (found[place] < kept.floor) continue;
    if (target < found[place]) break;
    target -= found[place];
  }
  const Weights& ends = candidates.run_ends;
  const int64_t run = std::upper_bound(ends.begin(), ends.end(), place) - ends.begin();
  if (run > 0) place -= ends[run - 1];
  int64_t weights[kRun], i = 0;
  weigh.weigh_run(run, weights);
  while (weights[i] < least || place-- > 0) ++i;
  return run * kRun + i;
}

int64_t draw(const float* scores, int64_t size, const float* largest, const Row& row,
             Candidates& candidates) {
  const int64_t best =
      largest == nullptr ? most_likely(scores, size) : most_likely(scores, size, largest);
  if (best < 0 || row.is_greedy) return best;
  const Weigher weigh(scores, size, scores[best], row);
  if (row.top_k == 0 && row.top_p >= 1)
    return draw_from_all(weigh, row.fraction, candidates.scratch);
  // Of a mass that is not known yet, the best token's weight is a part.
  const int64_t least =
      row.top_k > 0 ? 1 : std::max<int64_t>(1, nucleus_bound(kMaxWeight, row.top_p, size));
  Kept kept{1, candidates.collect(weigh, least)};
  if (row.top_k > 0) kept = heaviest(candidates, kept, row.top_k);
  if (row.top_p < 1) kept = nucleus(candidates, kept, row.top_p, size);
  if (kept.floor < least) return draw_from_all(weigh, row.fraction, candidates.scratch);
  return draw_from(candidates, weigh, least, kept, row.fraction);
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
    static thread_local Candidates candidates;
    team.take_turns(num_rows, [&](int64_t i) {
      const auto column = [&](int64_t index) { return parameters[index * num_rows + i]; };
      const Row row{column(0) > 0,
                    static_cast<float>(column(1)),
                    static_cast<int64_t>(column(2)),
                    static_cast<int64_t>(column(3)),
                    column(4),
                    column(5)};
      const float* own = largest == nullptr ? nullptr : largest + i * ((vocab_size + 31) / 32);
      token_ids[i] = draw(scores + i * vocab_size, vocab_size, own, row, candidates);
    });
  });
}

}  // extern "C"
