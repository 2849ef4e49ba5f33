// Copyright (c) the torchrl_vecnorm authors.
//
// This source code is licensed under the MIT license found in the
// LICENSE file in the root directory of this source tree.

#include "mutex.h"

#include <pthread.h>

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <ctime>
#include <new>
#include <system_error>

namespace vecnorm {
namespace shared {
namespace {

struct Block {
  // Names the layout: another libc or word size must not touch the mutex.
  uint64_t magic;
  pthread_mutex_t mutex;
};

constexpr uint64_t kMagic = 0x76656e6f726d0001u + (sizeof(pthread_mutex_t) << 8);

void check(int error, const char* what) {
  if (error != 0) {
    throw std::system_error(error, std::generic_category(), what);
  }
}

// True when the lock was taken. A robust mutex whose owner died is taken too, and is
// made usable again.
bool taken(int error, pthread_mutex_t* mutex) {
#ifdef __linux__
  if (error == EOWNERDEAD) {
    check(pthread_mutex_consistent(mutex), "pthread_mutex_consistent");
    return true;
  }
#endif
  if (error == EBUSY || error == ETIMEDOUT) {
    return false;
  }
  check(error, "pthread_mutex_lock");
  return true;
}

pthread_mutex_t* mutex_in(void* memory) { return &static_cast<Block*>(memory)->mutex; }

}  // namespace

size_t mutex_size() { return sizeof(Block); }

size_t mutex_alignment() { return alignof(Block); }

void mutex_init(void* memory) {
  Block* block = new (memory) Block;
  pthread_mutexattr_t attributes;
  check(pthread_mutexattr_init(&attributes), "pthread_mutexattr_init");
  check(pthread_mutexattr_setpshared(&attributes, PTHREAD_PROCESS_SHARED),
        "pthread_mutexattr_setpshared");
#ifdef __linux__
  check(pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST),
        "pthread_mutexattr_setrobust");
#endif
  check(pthread_mutex_init(&block->mutex, &attributes), "pthread_mutex_init");
  pthread_mutexattr_destroy(&attributes);
  block->magic = kMagic;
}

bool is_mutex(const void* memory) {
  return static_cast<const Block*>(memory)->magic == kMagic;
}

bool mutex_try_lock(void* memory) {
  return taken(pthread_mutex_trylock(mutex_in(memory)), mutex_in(memory));
}

bool mutex_lock(void* memory, double seconds) {
#ifdef __linux__
  timespec until;
  clock_gettime(CLOCK_REALTIME, &until);
  const double whole = static_cast<double>(static_cast<int64_t>(seconds));
  until.tv_sec += static_cast<time_t>(whole);
  until.tv_nsec += static_cast<long>((seconds - whole) * 1e9);
  if (until.tv_nsec >= 1000000000L) {
    until.tv_sec += 1;
    until.tv_nsec -= 1000000000L;
  }
  return taken(pthread_mutex_timedlock(mutex_in(memory), &until), mutex_in(memory));
#else
  // No timed lock here (macOS): ask again every millisecond.
  const timespec pause{0, 1000000};
  for (double waited = 0; waited < seconds; waited += 1e-3) {
    if (mutex_try_lock(memory)) {
      return true;
    }
    nanosleep(&pause, nullptr);
  }
  return mutex_try_lock(memory);
#endif
}

void mutex_unlock(void* memory) {
  check(pthread_mutex_unlock(mutex_in(memory)), "pthread_mutex_unlock");
}

}  // namespace shared
}  // namespace vecnorm
