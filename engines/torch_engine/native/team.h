// Threads that work through loops together, with a barrier after each.
//
// OpenMP starts them; its own barriers let a thread sleep after a hundred turns where a process has
// more threads than cores, as one with PyTorch has, and a step has hundreds of them: on 2 cores a
// decode of 32 requests then takes a fifth longer.

#pragma once

#include <immintrin.h>
#include <omp.h>
#include <sched.h>

#include <atomic>
#include <cstdint>

// Turns before a thread that waits lets others have its core.
constexpr int kSpinTurns = 4000;

class Team {
 public:
  explicit Team(int num_threads) : num_threads_(num_threads) {}

  int num_threads() const { return num_threads_; }

  // Call `work` for every number under `count`, in equal parts; every thread of the team calls this.
  template <class Work>
  void share(int64_t count, const Work& work) {
    const int64_t thread = omp_get_thread_num();
    const int64_t end = count * (thread + 1) / num_threads_;
    for (int64_t i = count * thread / num_threads_; i < end; ++i) work(i);
    wait();
  }

  // The same for work of unequal size: whoever is free takes the next one.
  template <class Work>
  void take_turns(int64_t count, const Work& work) {
    for (int64_t i = next_.fetch_add(1, std::memory_order_relaxed); i < count;
         i = next_.fetch_add(1, std::memory_order_relaxed))
      work(i);
    wait();
  }

 private:
  void wait() {
    const int64_t round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == num_threads_) {
      arrived_.store(0, std::memory_order_relaxed);
      next_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    for (int turn = 0; round_.load(std::memory_order_acquire) == round; ++turn) {
      if (turn < kSpinTurns)
        _mm_pause();
      else
        sched_yield();
    }
  }

  const int num_threads_;
  // Apart, so that those who wait do not disturb those who work.
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int64_t> round_{0};
};

// Run `work(team)` on so many threads.
template <class Work>
void run_team(int num_threads, const Work& work) {
  Team team(num_threads);
#pragma omp parallel num_threads(num_threads)
  work(team);
}
