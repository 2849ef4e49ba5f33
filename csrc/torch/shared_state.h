// Copyright (c) the torchrl_vecnorm authors.
//
// This source code is licensed under the MIT license found in the
// LICENSE file in the root directory of this source tree.

// Statistics in shared memory as tensors: their control block (control.h), the live
// leaves, and private copies that an update works on.

#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "../shared/control.h"

namespace vecnorm {
namespace shared {

using Tensors = std::vector<at::Tensor>;

class SharedState {
 public:
  // Bytes of a control block for these leaves.
  static int64_t size_for(const std::vector<std::string>& names, const Tensors& leaves,
                          const std::string& note);
  // Makes a control block in a zeroed uint8 tensor.
  static void init(const at::Tensor& control, const std::string& note);

  SharedState(at::Tensor control, std::vector<std::string> names, Tensors leaves);

  std::string note() const { return control_->note(); }
  bool has_journal() const { return control_->has_room(); }
  const Tensors& copies() const { return copies_; }

  // Takes the lock. Raises Python's TimeoutError, which names the owner, after
  // `seconds`.
  void acquire(double seconds);
  // False where somebody has it.
  bool try_acquire();
  void release() { control_->unlock(); }

  // With the lock held: reads the leaves into the copies, and writes them back, all or
  // none.
  void load();
  void commit();
  // Or updates the leaves where they are, as Control::begin() has it.
  bool begin() { return control_->begin(); }
  void end() { control_->end(); }
  void undo() { control_->undo(); }
  std::string lost() const { return control_->lost(); }

 private:
  // Sending a tensor to a process can move its memory: follows it.
  void follow();

  at::Tensor memory_;  // kept, and with it the mapping
  std::vector<std::string> names_;
  std::vector<void*> addresses_;
  Tensors leaves_;
  Tensors copies_;
  std::vector<const void*> values_;
  std::optional<Control> control_;
};

// Holds the lock.
class Guard {
 public:
  Guard(SharedState* state, double seconds) : state_(state) {
    if (state_ != nullptr) {
      state_->acquire(seconds);
    }
  }
  ~Guard() {
    try {
      release();
    } catch (const std::exception&) {
      // An error is on its way already, or the lock was overwritten: nothing to give
      // back.
    }
  }
  Guard(const Guard&) = delete;
  Guard& operator=(const Guard&) = delete;

  void release() {
    if (SharedState* state = std::exchange(state_, nullptr)) {
      state->release();
    }
  }

 private:
  SharedState* state_;
};

}  // namespace shared
}  // namespace vecnorm
