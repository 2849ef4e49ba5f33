// Copyright (c) the torchrl_vecnorm authors.
//
// This source code is licensed under the MIT license found in the
// LICENSE file in the root directory of this source tree.

// A lock in shared memory that becomes free when its owner dies, in one of two ways:
//
//   robust_mutex.cpp  a robust process-shared mutex: the kernel gives it to the next
//   record_lock.cpp   where there are none (macOS), or with -DVECNORM_RECORD_LOCK: a
//                     byte of a file is locked, which ends with the process
//
// Threads of a process exclude each other as processes do.

#pragma once

#include <cstdint>

#if defined(__linux__) && !defined(VECNORM_RECORD_LOCK)
#define VECNORM_ROBUST_MUTEX
#include <pthread.h>
#endif

namespace vecnorm {
namespace shared {

enum class Taken {
  kNo,        // somebody has it
  kYes,       // it is ours
  kFromDead,  // it is ours, its owner died: recovered() makes it usable again
};

// Lives in zeroed memory, and at one place of it.
class Lock {
 public:
  // What a lock of the other kind, or of another machine's, has as another number.
  static uint64_t kind();

  // Makes it anew, free. Nobody may use it meanwhile.
  void init();

  Taken try_lock();
  Taken lock(double seconds);
  void recovered();
  void unlock();

 private:
#ifdef VECNORM_ROBUST_MUTEX
  pthread_mutex_t mutex_;
#else
  int64_t byte_;  // of the file
#endif
};

}  // namespace shared
}  // namespace vecnorm
