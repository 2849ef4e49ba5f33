// Copyright (c) the torchrl_vecnorm authors.
//
// This source code is licensed under the MIT license found in the
// LICENSE file in the root directory of this source tree.

// Where a piece of memory lives, so that a copy of it can be told from the original.

#pragma once

#include <cstdint>
#include <mutex>
#include <string>

namespace vecnorm {
namespace shared {

// FNV-1a.
uint64_t hash_of(const std::string& text);

// The same number for the same memory in all processes of a machine, however they came
// by it, until that starts anew; another one for a copy. Made of the boot id and of the
// mapping: the device, inode and offset of shared memory, the process and address of
// private memory. 0 where the system does not tell.
uint64_t identity_of(const void* memory);

// A file that all processes of this user find, whatever their TMPDIR.
std::string lock_file(const char* suffix);

// Opens it; -1, and errno, where there can be none.
int open_lock_file(const char* suffix);

// Held by one thread of the machine at a time: an flock of such a file. Where that
// cannot be written, by one thread of the process.
class FileLock {
 public:
  FileLock();
  ~FileLock();
  FileLock(const FileLock&) = delete;
  FileLock& operator=(const FileLock&) = delete;

 private:
  std::unique_lock<std::mutex> threads_;
  int fd_;
};

}  // namespace shared
}  // namespace vecnorm
