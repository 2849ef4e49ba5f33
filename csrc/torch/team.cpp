// Copyright (c) the torchrl_vecnorm authors.
//
// This source code is licensed under the MIT license found in the
// LICENSE file in the root directory of this source tree.

#include "team.h"

#include <ATen/Parallel.h>
#include <pthread.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>

#include "../cpu/choice.h"

namespace vecnorm {
namespace {

std::atomic<bool> forked{false};  // in forked children

[[maybe_unused]] const int registered =
    pthread_atfork(nullptr, nullptr, [] { forked.store(true); });

#ifdef _OPENMP

double now() {
  using std::chrono::steady_clock;
  return std::chrono::duration<double>(steady_clock::now().time_since_epoch()).count();
}

// Calls of a kind and size are alike. Each calling thread sees for itself.
cpu::Choice& choice_of(size_t phases, int64_t values) {
  thread_local std::array<std::array<cpu::Choice, 64>, 4> choices;
  int size = 0;
  while (values >>= 1) {
    ++size;
  }
  return choices[std::min<size_t>(phases, 4) - 1][size];
}

void run_together(const std::vector<cpu::Phase>& phases, int64_t threads) {
  // One team for all phases, the one that at::parallel_for uses too: starting it anew
  // for each phase would cost as much as a small update.
#pragma omp parallel num_threads(static_cast<int>(threads))
  {
    const int64_t rank = omp_get_thread_num();
    const int64_t team = omp_get_num_threads();
    for (const cpu::Phase& phase : phases) {
      if (&phase != &phases.front()) {
#pragma omp barrier
      }
      phase.body(phase.parts * rank / team, phase.parts * (rank + 1) / team);
    }
  }
}

void run_alone(const std::vector<cpu::Phase>& phases) {
  for (const cpu::Phase& phase : phases) {
    phase.body(0, phase.parts);
  }
}

#endif

}  // namespace

void run_phases(const std::vector<cpu::Phase>& phases, int64_t values) {
#ifdef _OPENMP
  int64_t threads = 1;
  for (const cpu::Phase& phase : phases) {
    threads = std::max(threads, phase.parts);
  }
  threads =
      at::in_parallel_region() ? 1 : std::min<int64_t>(threads, at::get_num_threads());
  if (threads == 1) {
    run_alone(phases);
    return;
  }
  cpu::Choice& choice = choice_of(phases.size(), values);
  const double start = now();
  if (choice.together()) {
    run_together(phases, threads);
    choice.went_together(now() - start, values, threads);
  } else {
    run_alone(phases);
    choice.went_alone(now() - start, values);
  }
#else
  for (const cpu::Phase& phase : phases) {
    at::parallel_for(0, phase.parts, 1, phase.body);
  }
#endif
}

void leave_the_pool_after_fork() {
  if (forked.load() && forked.exchange(false)) {
    at::set_num_threads(1);
  }
}

}  // namespace vecnorm
