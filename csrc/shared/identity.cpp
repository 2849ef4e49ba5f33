// Copyright (c) the torchrl_vecnorm authors.
//
// This source code is licensed under the MIT license found in the
// LICENSE file in the root directory of this source tree.

#include "identity.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cinttypes>
#include <cstdio>
#include <fstream>
#include <sstream>

// Tests remove the files in it.
#ifndef VECNORM_LOCK_FOLDER
#define VECNORM_LOCK_FOLDER "/tmp"
#endif
// Tests write it.
#ifndef VECNORM_BOOT_ID
#define VECNORM_BOOT_ID "/proc/sys/kernel/random/boot_id"
#endif

namespace vecnorm {
namespace shared {
namespace {

#ifdef __linux__

std::string first_line(const char* file) {
  std::ifstream stream(file);
  std::string line;
  std::getline(stream, line);
  return line;
}

// What the kernel says about the mapping at an address.
std::string mapping(const void* memory) {
  const auto address = reinterpret_cast<uintptr_t>(memory);
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);) {
    uint64_t begin = 0, end = 0, offset = 0, inode = 0;
    char mode[8] = "", device[16] = "";
    if (std::sscanf(line.c_str(),
                    "%" SCNx64 "-%" SCNx64 " %7s %" SCNx64 " %15s %" SCNu64, &begin,
                    &end, mode, &offset, device, &inode) == 6 &&
        begin <= address && address < end) {
      std::ostringstream text;
      if (mode[3] == 's' && inode != 0) {
        text << "shared " << device << ' ' << inode << ' '
             << offset + (address - begin);
      } else {
        text << "private " << getpid() << ' ' << address;
      }
      return text.str();
    }
  }
  return "";
}

#endif

std::mutex& threads() {
  static auto* mutex = new std::mutex;
  return *mutex;
}

}  // namespace

uint64_t hash_of(const std::string& text) {
  uint64_t hash = 14695981039346656037u;
  for (const char c : text) {
    hash = (hash ^ static_cast<unsigned char>(c)) * 1099511628211u;
  }
  return hash;
}

uint64_t identity_of(const void* memory) {
#ifdef __linux__
  const std::string where = mapping(memory);
  const std::string boot = first_line(VECNORM_BOOT_ID);
  if (where.empty() || boot.empty()) {
    return 0;
  }
  return hash_of(boot + ' ' + where);
#else
  return 0;
#endif
}

std::string lock_file(const char* suffix) {
  return VECNORM_LOCK_FOLDER "/torchrl_vecnorm-" + std::to_string(getuid()) + suffix;
}

int open_lock_file(const char* suffix) {
  // Nobody else's: a link there could lead anywhere.
  return open(lock_file(suffix).c_str(), O_RDWR | O_CLOEXEC | O_CREAT | O_NOFOLLOW,
              0600);
}

FileLock::FileLock() : threads_(threads()) {
  fd_ = open_lock_file(".lock");
  while (fd_ >= 0 && flock(fd_, LOCK_EX) != 0 && errno == EINTR) {
  }
}

FileLock::~FileLock() {
  if (fd_ >= 0) {
    // A child that was forked meanwhile has the file open too.
    flock(fd_, LOCK_UN);
    close(fd_);
  }
}

}  // namespace shared
}  // namespace vecnorm
