// Copyright (c) the torchrl_vecnorm authors.
//
// This source code is licensed under the MIT license found in the
// LICENSE file in the root directory of this source tree.

// Statistics in shared memory as tensors: their control block (control.h), the live
// leaves, and private copies that an update works on.

#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <vector>

#include "control.h"

namespace vecnorm {
namespace shared {

using Tensors = std::vector<at::Tensor>;

class SharedState {
 public:
  // Bytes of a control block for these leaves.
  static int64_t size_for(const std::vector<std::string>& names, const Tensors& leaves,
                          const std::string& note);
  // Makes a control block in a zeroed uint8 tensor. `file` is the file behind it.
  static void init(const at::Tensor& control, const std::string& note,
                   const std::string& file);

  SharedState(at::Tensor control, std::vector<std::string> names, Tensors leaves,
              const std::string& file);

  std::string note() const { return control_.note(); }
  const Tensors& copies() const { return copies_; }

  // Takes the lock. Raises Python's TimeoutError, which names the owner, after
  // `seconds`.
  void acquire(double seconds);
  // False where somebody has it.
  bool try_acquire() { return control_.try_lock(); }
  void release() { control_.unlock(); }

  // With the lock held: reads the leaves into the copies, and writes them back, all or
  // none.
  void load();
  void commit();
  std::string lost() const { return control_.lost(); }

 private:
  at::Tensor memory_;  // kept, and with it the mapping
  Tensors leaves_;
  Tensors copies_;
  std::vector<const void*> values_;
  Control control_;
};

// Holds the lock.
class Guard {
 public:
  Guard(SharedState* state, double seconds) : state_(state) {
    if (state_ != nullptr) {
      state_->acquire(seconds);
    }
  }
  ~Guard() { release(); }
  Guard(const Guard&) = delete;
  Guard& operator=(const Guard&) = delete;

  void release() {
    if (state_ != nullptr) {
      state_->release();
      state_ = nullptr;
    }
  }

 private:
  SharedState* state_;
};

}  // namespace shared
}  // namespace vecnorm
