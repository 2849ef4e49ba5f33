// Copyright (c) the torchrl_vecnorm authors.
//
// This source code is licensed under the MIT license found in the
// LICENSE file in the root directory of this source tree.

// Each lock is a byte, chosen at random, of one file that all processes of a user have
// open; fcntl(F_SETLK) locks it. Such record locks are the process's: a child that is
// forked has none of them, so that it cannot keep its parent's alive, as it would with
// flock. All of them end where any descriptor of the file is closed, so ours never is.

#include "lock.h"

#ifndef VECNORM_ROBUST_MUTEX

#include <fcntl.h>
#include <pthread.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <ctime>
#include <mutex>
#include <random>
#include <set>
#include <system_error>

#include "identity.h"

namespace vecnorm {
namespace shared {
namespace {

// What this process has: the kernel does not tell its threads apart.
struct Process {
  std::mutex mutex;
  int fd = -1;
  std::set<int64_t> held;
};

// Outlives all that may still give a lock back, and is usable in a child.
Process& process() {
  static Process* const p = [] {
    static auto* made = new Process;
    pthread_atfork([] { made->mutex.lock(); }, [] { made->mutex.unlock(); },
                   [] {
                     made->held.clear();
                     made->mutex.unlock();
                   });
    return made;
  }();
  return *p;
}

// Sets a lock of a byte; false where another process has it.
bool set(int fd, short type, int64_t byte) {
  struct flock record = {};
  record.l_type = type;
  record.l_whence = SEEK_SET;
  record.l_start = static_cast<off_t>(byte);
  record.l_len = 1;
  while (fcntl(fd, F_SETLK, &record) != 0) {
    if (errno == EACCES || errno == EAGAIN) {
      return false;
    }
    if (errno != EINTR) {
      throw std::system_error(errno, std::generic_category(), "fcntl(F_SETLK)");
    }
  }
  return true;
}

bool is_removed(int fd) {
  struct stat status;
  return fstat(fd, &status) != 0 || status.st_nlink == 0;
}

}  // namespace

uint64_t Lock::kind() { return 0x7265636f7264u + sizeof(Lock); }

void Lock::init() {
  std::random_device random;
  const uint64_t bits = (static_cast<uint64_t>(random()) << 32) | random();
  byte_ = static_cast<int64_t>(bits >> 2);  // of any file that off_t can hold
}

Taken Lock::try_lock() {
  Process& p = process();
  const std::lock_guard<std::mutex> guard(p.mutex);
  if (p.held.count(byte_) != 0) {
    return Taken::kNo;
  }
  for (;;) {
    if (p.fd < 0) {
      p.fd = open_lock_file(".locks");
      if (p.fd < 0) {
        throw std::system_error(errno, std::generic_category(),
                                "the file of locks in /tmp cannot be opened");
      }
    }
    if (!set(p.fd, F_WRLCK, byte_)) {
      return Taken::kNo;
    }
    if (!is_removed(p.fd)) {
      break;
    }
    // Somebody has tidied up: others lock a new file. Closing the old one would free
    // what this process has of it.
    p.fd = -1;
  }
  p.held.insert(byte_);
  return Taken::kYes;
}

Taken Lock::lock(double seconds) {
  timespec now;
  const auto time = [&] {
    clock_gettime(CLOCK_MONOTONIC, &now);
    return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
  };
  const double until = time() + seconds;
  // The kernel can wait for a byte, but not for a while.
  for (long pause = 10000;; pause = std::min(2 * pause, 1000000L)) {
    const Taken taken = try_lock();
    if (taken != Taken::kNo || time() >= until) {
      return taken;
    }
    const timespec nanoseconds{0, pause};
    nanosleep(&nanoseconds, nullptr);
  }
}

void Lock::recovered() {}

void Lock::unlock() {
  Process& p = process();
  const std::lock_guard<std::mutex> guard(p.mutex);
  if (p.held.erase(byte_) == 0) {
    throw std::system_error(EPERM, std::generic_category(), "Lock::unlock");
  }
  set(p.fd, F_UNLCK, byte_);
}

}  // namespace shared
}  // namespace vecnorm

#endif
