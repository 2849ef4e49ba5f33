// Copyright (c) the torchrl_vecnorm authors.
//
// This source code is licensed under the MIT license found in the
// LICENSE file in the root directory of this source tree.

// Runs csrc/cuda/*.cu on the host, in place of csrc/cuda/device.h.
//
// Blocks that wait for each other are all there at once, others run one after the
// other. Threads are fibers on one host thread, in ascending or in descending order,
// each running until it has to wait; or, with VECNORM_HOST_THREADS, host threads, so
// that ThreadSanitizer sees a missing barrier as the data race it is. A barrier waits
// for the threads of a block that are still running, as it does on a GPU.

#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include "csrc/cuda/launch.h"
#include "csrc/cuda/plan.h"

#define __global__
#define __device__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)

using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
constexpr cudaError_t cudaErrorCooperativeLaunchTooLarge = 720;

namespace emulation {

struct Index {
  unsigned x;
};

inline bool descending = false;
// Some blocks stand still while others come to their end.
inline bool uneven = false;
// The emulated GPUs have few processors and little memory, so that small inputs already
// overflow; the third one knows neither clusters nor cooperative launches.
inline const vecnorm::cuda::Limits devices[] = {{7, 24 * 1024, {4, 3, 2}, true},
                                                {9, 96 * 1024, {4, 2, 2}, true},
                                                {5, 64 * 1024, {}, false},
                                                {9, 96 * 1024, {4, 2, 2}, true}};
inline int device = 0;
// Shared memory that kernels may have, on each device, where it is not 48 KB.
inline std::map<std::pair<int, void*>, size_t> allowed;
// Launches of blocks that need each other are refused, as they are when another process
// holds processors.
inline bool busy = false;

// Threads that meet: the last one lets the others go on.
class Meeting {
 public:
  explicit Meeting(int threads) : running_(threads) {}

  // Returns the round to wait for.
  unsigned arrive() {
    const std::lock_guard<std::mutex> lock(mutex_);
    const unsigned round = round_.load();
    ++arrived_;
    go_on();
    return round;
  }

  bool is_over(unsigned round) const { return round_.load() != round; }

  // Returns how many stay.
  int leave() {
    const std::lock_guard<std::mutex> lock(mutex_);
    --running_;
    go_on();
    return running_;
  }

 private:
  void go_on() {
    if (arrived_ == running_ && running_ > 0) {
      arrived_ = 0;
      ++round_;
    }
  }

  std::mutex mutex_;
  int running_;
  int arrived_ = 0;
  std::atomic<unsigned> round_{0};
};

struct Block {
  Index index;
  Meeting all;
  std::vector<std::unique_ptr<Meeting>> warps;
  std::vector<double> lanes;  // what the threads of a warp show each other
  std::atomic<int> votes[2] = {0, 0};
  size_t bytes;
  std::unique_ptr<char[]> memory;
  Meeting* cluster;

  Block(int i, const vecnorm::cuda::Launch& shape, Meeting* together)
      : index{static_cast<unsigned>(i)},
        all(shape.threads),
        lanes(shape.threads),
        bytes(shape.shared + 16),
        memory(new char[shape.shared + 16]),
        cluster(together) {
    for (int t = 0; t < shape.threads; t += vecnorm::cuda::kWarp) {
      warps.push_back(
          std::make_unique<Meeting>(std::min(vecnorm::cuda::kWarp, shape.threads - t)));
    }
    poison();
  }

  void poison() { std::memset(memory.get(), 0xff, bytes); }  // NaN

  char* shared() const {
    const auto at = reinterpret_cast<uintptr_t>(memory.get());
    return memory.get() + (16 - at % 16) % 16;
  }
};

struct Thread {
  Block* block = nullptr;
  Index index = {0};
  int phase = 0;               // of the votes
  unsigned cluster_round = 0;  // when it arrived
#ifndef VECNORM_HOST_THREADS
  ucontext_t context;
  jmp_buf stopped;
  bool started = false;
  bool done = false;
#endif
};

inline std::vector<std::unique_ptr<Block>> blocks;
inline Index block_dim;
inline Index grid_dim;
inline int cluster_size;
inline const std::function<void()>* body;

#ifdef VECNORM_HOST_THREADS

inline thread_local Thread* current;

inline void yield() { std::this_thread::yield(); }

#else

inline Thread* current;

#ifdef __SANITIZE_ADDRESS__

inline ucontext_t scheduler;

inline void yield() { swapcontext(&current->context, &scheduler); }

inline void resume(Thread* thread) {
  current = thread;
  swapcontext(&scheduler, &thread->context);
}

#else

// swapcontext() asks the kernel for the signal mask, each time: four fifths of the run.
// AddressSanitizer does not know of such jumps.
inline jmp_buf scheduler;

inline void yield() {
  if (_setjmp(current->stopped) == 0) {
    _longjmp(scheduler, 1);
  }
}

inline void resume(Thread* thread) {
  current = thread;
  if (_setjmp(scheduler) != 0) {
    return;
  }
  if (thread->started) {
    _longjmp(thread->stopped, 1);
  }
  thread->started = true;
  setcontext(&thread->context);
}

#endif

#endif

inline void wait(const Meeting& m, unsigned round) {
  while (!m.is_over(round)) {
    yield();
  }
}

inline void meet(Meeting& m) { wait(m, m.arrive()); }

inline Meeting& warp() {
  return *current->block->warps[current->index.x / vecnorm::cuda::kWarp];
}

// The counter of one vote is cleared during the next.
inline int vote(bool yes) {
  int& phase = current->phase;
  Block& block = *current->block;
  if (yes) {
    block.votes[phase].fetch_add(1);
  }
  meet(block.all);
  const int count = block.votes[phase].load();
  meet(block.all);
  block.votes[phase].store(0);
  phase = 1 - phase;
  return count;
}

inline void run_thread() {
  (*body)();
  warp().leave();
  if (current->block->all.leave() == 0) {
    current->block->poison();  // a block's memory ends with it
  }
}

#ifdef VECNORM_HOST_THREADS

inline void run_blocks(const std::vector<Block*>& together, int threads) {
  std::vector<std::unique_ptr<Thread>> all;
  std::vector<std::thread> pool;
  for (Block* block : together) {
    for (int t = 0; t < threads; ++t) {
      all.push_back(std::make_unique<Thread>());
      all.back()->block = block;
      all.back()->index.x = static_cast<unsigned>(t);
      pool.emplace_back([thread = all.back().get()] {
        current = thread;
        run_thread();
      });
    }
  }
  for (std::thread& t : pool) {
    t.join();
  }
}

#else

constexpr size_t kStack = 96 * 1024;

inline void enter() {
  run_thread();
  current->done = true;
  yield();
}

inline std::unique_ptr<Thread> start(Block* block, int index, char* stack) {
  auto thread = std::make_unique<Thread>();
  thread->block = block;
  thread->index.x = static_cast<unsigned>(index);
  getcontext(&thread->context);
  thread->context.uc_stack.ss_sp = stack;
  thread->context.uc_stack.ss_size = kStack;
  thread->context.uc_link = nullptr;
  makecontext(&thread->context, enter, 0);
  return thread;
}

inline void run_blocks(const std::vector<Block*>& together, int threads) {
  static std::vector<std::unique_ptr<char[]>> stacks;
  std::vector<std::unique_ptr<Thread>> all;
  for (Block* block : together) {
    for (int t = 0; t < threads; ++t) {
      if (stacks.size() == all.size()) {
        stacks.emplace_back(new char[kStack]);
      }
      all.push_back(start(block, t, stacks[all.size()].get()));
    }
  }
  if (descending) {
    std::reverse(all.begin(), all.end());
  }
  constexpr int kStandStill = 24;
  static std::minstd_rand luck;
  auto moving = luck();
  int rounds = 0;
  for (size_t left = all.size(); left > 0;) {
    if (++rounds % kStandStill == 0) {
      moving = luck();
    }
    for (const auto& thread : all) {
      const unsigned bit = thread->block->index.x % 16;
      if (!thread->done && (!uneven || (moving >> bit & 1) != 0)) {
        resume(thread.get());
        left -= thread->done;
      }
    }
  }
}

#endif

}  // namespace emulation

#define threadIdx (emulation::current->index)
#define blockIdx (emulation::current->block->index)
#define blockDim (emulation::block_dim)
#define gridDim (emulation::grid_dim)

inline void __syncthreads() { emulation::meet(emulation::current->block->all); }
inline int __syncthreads_or(bool yes) { return emulation::vote(yes) != 0; }
inline int __syncthreads_count(bool yes) { return emulation::vote(yes); }

namespace vecnorm {
namespace cuda {

using Stream = void*;

inline cudaError_t current_device(int* device) {
  *device = emulation::device;
  return cudaSuccess;
}

inline cudaError_t query(int device, Limits* limits) {
  *limits = emulation::devices[device];
  return cudaSuccess;
}

template <typename Params>
cudaError_t allow_shared(void (*kernel)(Params), size_t bytes) {
  emulation::allowed[{emulation::device, reinterpret_cast<void*>(kernel)}] = bytes;
  return cudaSuccess;
}

template <typename Params>
cudaError_t blocks_at_once(void (*)(Params), int, size_t, int* blocks) {
  *blocks = 1;
  return cudaSuccess;
}

template <typename Params>
cudaError_t clusters_at_once(void (*)(Params), int size, int, size_t, int* clusters) {
  *clusters = emulation::devices[emulation::device].clusters[log2_of(size) - 1];
  return cudaSuccess;
}

template <typename Params>
cudaError_t load_now(void (*)(Params)) {
  return cudaSuccess;
}

inline bool is_refusal(cudaError_t error) {
  return error == cudaErrorCooperativeLaunchTooLarge;
}

inline void forget_error() {}

struct OutsideCapture {
  ~OutsideCapture() {}
};

template <typename Params>
cudaError_t launch(void (*kernel)(Params), const Launch& shape, Stream,
                   const Params& params) {
  const Limits& limits = emulation::devices[emulation::device];
  if (emulation::busy && (shape.cooperative || shape.cluster > 1)) {
    return cudaErrorCooperativeLaunchTooLarge;
  }
  const auto allowed =
      emulation::allowed.find({emulation::device, reinterpret_cast<void*>(kernel)});
  const size_t shared =
      allowed == emulation::allowed.end() ? 48 * 1024 : allowed->second;
  if (shape.shared > shared || shape.blocks % shape.cluster != 0 ||
      (shape.cooperative && !limits.cooperative) ||
      (shape.cluster > 1 && limits.clusters[log2_of(shape.cluster) - 1] == 0) ||
      (shape.cooperative && shape.blocks > limits.processors)) {
    std::fprintf(
        stderr,
        "a launch that a GPU would refuse: %d blocks, clusters of %d, %zu bytes "
        "of shared memory\n",
        shape.blocks, shape.cluster, shape.shared);
    std::abort();
  }
  emulation::block_dim.x = static_cast<unsigned>(shape.threads);
  emulation::grid_dim.x = static_cast<unsigned>(shape.blocks);
  emulation::cluster_size = shape.cluster;
  const std::function<void()> body = [&] { kernel(params); };
  emulation::body = &body;
  emulation::blocks.clear();
  std::vector<std::unique_ptr<emulation::Meeting>> clusters;
  for (int i = 0; i < shape.blocks; ++i) {
    if (i % shape.cluster == 0) {
      clusters.push_back(
          std::make_unique<emulation::Meeting>(shape.cluster * shape.threads));
    }
    emulation::blocks.push_back(
        std::make_unique<emulation::Block>(i, shape, clusters.back().get()));
  }
  // Groups of blocks that need each other; the groups may run in any order.
  const int together = shape.cooperative ? shape.blocks : shape.cluster;
  const int groups = shape.blocks / together;
  for (int g = 0; g < groups; ++g) {
    const int first = (emulation::descending ? groups - 1 - g : g) * together;
    std::vector<emulation::Block*> group;
    for (int i = 0; i < together; ++i) {
      group.push_back(emulation::blocks[first + i].get());
    }
    emulation::run_blocks(group, shape.threads);
  }
  return cudaSuccess;
}

inline char* shared_memory() { return emulation::current->block->shared(); }

template <typename T>
void store_streaming(T* to, const T& value) {
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0) {
    std::fprintf(stderr, "misaligned 16-byte store\n");
    std::abort();
  }
  *to = value;
}

inline double shuffle_xor(double value, int lanes) {
  emulation::Block& block = *emulation::current->block;
  const unsigned thread = emulation::current->index.x;
  block.lanes[thread] = value;
  emulation::meet(emulation::warp());
  const double other = block.lanes[thread ^ static_cast<unsigned>(lanes)];
  emulation::meet(emulation::warp());
  return other;
}

inline int opaque(unsigned x) { return static_cast<int>(x); }

inline unsigned fetch_add(unsigned* to, unsigned value) {
  return std::atomic_ref<unsigned>(*to).fetch_add(value);
}

// ThreadSanitizer does not know that a load has come whose value is in use.
inline unsigned fetch_add_relaxed(unsigned* to, unsigned value) {
  return fetch_add(to, value);
}

inline void add_release(unsigned* to, unsigned value) { fetch_add(to, value); }

inline unsigned load_relaxed(const unsigned* from) {
  return std::atomic_ref<unsigned>(*const_cast<unsigned*>(from))
      .load(std::memory_order_relaxed);
}

inline unsigned load_acquire(const unsigned* from) {
  return std::atomic_ref<unsigned>(*const_cast<unsigned*>(from)).load();
}

inline void pause() { emulation::yield(); }

constexpr bool kHasClusters = true;

inline void cluster_arrive() {
  emulation::current->cluster_round = emulation::current->block->cluster->arrive();
}

inline void cluster_arrive_relaxed() { cluster_arrive(); }

inline void cluster_wait() {
  emulation::wait(*emulation::current->block->cluster,
                  emulation::current->cluster_round);
}

inline double load_peer(double* mine, int rank) {
  const emulation::Block& block = *emulation::current->block;
  const int first = static_cast<int>(block.index.x) / emulation::cluster_size *
                    emulation::cluster_size;
  const emulation::Block* other = emulation::blocks[first + rank].get();
  return *reinterpret_cast<const double*>(
      other->shared() + (reinterpret_cast<char*>(mine) - block.shared()));
}

}  // namespace cuda
}  // namespace vecnorm
