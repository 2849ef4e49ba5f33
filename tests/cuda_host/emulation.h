// Copyright (c) the torchrl_vecnorm authors.
//
// This source code is licensed under the MIT license found in the
// LICENSE file in the root directory of this source tree.

// Runs csrc/cuda/kernels.cu on the host, in place of csrc/cuda/device.h.
//
// Blocks run one after the other. The threads of a block are fibers on one host thread,
// each running up to its next barrier, in ascending or in descending order; or, with
// VECNORM_HOST_THREADS, host threads, so that ThreadSanitizer sees a missing barrier as
// the data race it is. Shared memory is static: one block is there at a time.

#pragma once

#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <barrier>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(threads)

using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;

namespace emulation {

struct Index {
  unsigned x;
};

// How many threads of a block wait at a barrier, and what they bring to it.
struct Vote {
  std::atomic<int> count[2] = {0, 0};
};

inline bool descending = false;
inline Vote votes;

#ifdef VECNORM_HOST_THREADS

inline thread_local Index thread_index;
inline thread_local int phase;
inline std::unique_ptr<std::barrier<>> meeting;

inline void wait() { meeting->arrive_and_wait(); }

inline void leave() { meeting->arrive_and_drop(); }

inline void run_block(int threads, const std::function<void()>& body) {
  meeting = std::make_unique<std::barrier<>>(threads);
  std::vector<std::thread> pool;
  for (int t = 0; t < threads; ++t) {
    pool.emplace_back([&body, t] {
      thread_index.x = static_cast<unsigned>(t);
      phase = 0;
      body();
      leave();
    });
  }
  for (std::thread& t : pool) {
    t.join();
  }
}

inline int& phase_of_thread() { return phase; }

#else

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done;
  int phase;
};

constexpr size_t kStack = 128 * 1024;
inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline int current;
inline Index thread_index;
inline const std::function<void()>* block_body;

inline void wait() { swapcontext(&fibers[current].context, &scheduler); }

inline void enter() {
  (*block_body)();
  fibers[current].done = true;
  swapcontext(&fibers[current].context, &scheduler);
}

inline void run_block(int threads, const std::function<void()>& body) {
  block_body = &body;
  fibers.resize(threads);
  for (Fiber& fiber : fibers) {
    if (fiber.stack == nullptr) {
      fiber.stack = std::make_unique<char[]>(kStack);
    }
    fiber.done = false;
    fiber.phase = 0;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
  }
  for (bool running = true; running;) {
    running = false;
    for (int i = 0; i < threads; ++i) {
      current = descending ? threads - 1 - i : i;
      if (!fibers[current].done) {
        thread_index.x = static_cast<unsigned>(current);
        swapcontext(&scheduler, &fibers[current].context);
        running = running || !fibers[current].done;
      }
    }
  }
}

inline int& phase_of_thread() { return fibers[current].phase; }

#endif

inline Index block_index;
inline Index block_dim;
inline Index grid_dim;

// Two barriers a vote; the counter of one vote is cleared during the next.
inline int vote(bool yes) {
  int& phase = phase_of_thread();
  if (yes) {
    votes.count[phase].fetch_add(1);
  }
  wait();
  const int count = votes.count[phase].load();
  wait();
  votes.count[phase].store(0);
  phase = 1 - phase;
  return count;
}

}  // namespace emulation

#define threadIdx (emulation::thread_index)
#define blockIdx (emulation::block_index)
#define blockDim (emulation::block_dim)
#define gridDim (emulation::grid_dim)

inline void __syncthreads() { emulation::wait(); }
inline int __syncthreads_or(bool yes) { return emulation::vote(yes) != 0; }
inline int __syncthreads_count(bool yes) { return emulation::vote(yes); }
inline void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }

inline unsigned atomicAdd(unsigned* to, unsigned value) {
  return std::atomic_ref<unsigned>(*to).fetch_add(value);
}

namespace vecnorm {
namespace cuda {

using Stream = void*;

template <typename Params>
cudaError_t launch(void (*kernel)(Params), int blocks, int threads, Stream,
                   const Params& params) {
  emulation::block_dim.x = static_cast<unsigned>(threads);
  emulation::grid_dim.x = static_cast<unsigned>(blocks);
  // Blocks may run in any order: nothing may depend on it.
  for (int i = 0; i < blocks; ++i) {
    const int block = emulation::descending ? blocks - 1 - i : i;
    emulation::block_index.x = static_cast<unsigned>(block);
    emulation::run_block(threads, [&] { kernel(params); });
  }
  return cudaSuccess;
}

template <typename T>
void store_streaming(T* to, const T& value) {
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0) {
    std::fprintf(stderr, "misaligned 16-byte store\n");
    std::abort();
  }
  *to = value;
}

}  // namespace cuda
}  // namespace vecnorm
