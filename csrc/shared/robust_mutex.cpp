// Copyright (c) the torchrl_vecnorm authors.
//
// This source code is licensed under the MIT license found in the
// LICENSE file in the root directory of this source tree.

#include "lock.h"

#ifdef VECNORM_ROBUST_MUTEX

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <ctime>
#include <system_error>

namespace vecnorm {
namespace shared {
namespace {

void check(int error, const char* what) {
  if (error != 0) {
    throw std::system_error(error, std::generic_category(), what);
  }
}

Taken taken(int error) {
  if (error == EBUSY || error == ETIMEDOUT) {
    return Taken::kNo;
  }
  if (error == EOWNERDEAD) {
    return Taken::kFromDead;
  }
  check(error, "pthread_mutex_lock");
  return Taken::kYes;
}

}  // namespace

uint64_t Lock::kind() { return sizeof(pthread_mutex_t); }

void Lock::init() {
  pthread_mutexattr_t attributes;
  check(pthread_mutexattr_init(&attributes), "pthread_mutexattr_init");
  check(pthread_mutexattr_setpshared(&attributes, PTHREAD_PROCESS_SHARED),
        "pthread_mutexattr_setpshared");
  check(pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST),
        "pthread_mutexattr_setrobust");
  std::memset(&mutex_, 0, sizeof(mutex_));
  check(pthread_mutex_init(&mutex_, &attributes), "pthread_mutex_init");
  pthread_mutexattr_destroy(&attributes);
}

Taken Lock::try_lock() { return taken(pthread_mutex_trylock(&mutex_)); }

Taken Lock::lock(double seconds) {
  // Of the wall clock, the only one that every C library can wait by.
  timespec until;
  clock_gettime(CLOCK_REALTIME, &until);
  seconds = std::min(seconds, 1e9);
  const auto whole = static_cast<time_t>(seconds);
  until.tv_sec += whole;
  until.tv_nsec += static_cast<long>((seconds - static_cast<double>(whole)) * 1e9);
  if (until.tv_nsec >= 1000000000L) {
    until.tv_sec += 1;
    until.tv_nsec -= 1000000000L;
  }
  return taken(pthread_mutex_timedlock(&mutex_, &until));
}

void Lock::recovered() {
  check(pthread_mutex_consistent(&mutex_), "pthread_mutex_consistent");
}

void Lock::unlock() { check(pthread_mutex_unlock(&mutex_), "pthread_mutex_unlock"); }

}  // namespace shared
}  // namespace vecnorm

#endif
