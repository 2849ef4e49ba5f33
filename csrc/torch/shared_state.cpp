// Copyright (c) the torchrl_vecnorm authors.
//
// This source code is licensed under the MIT license found in the
// LICENSE file in the root directory of this source tree.

#include "shared_state.h"

#include <ATen/Functions.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <cstring>
#include <fstream>
#include <sstream>
#include <utility>

namespace vecnorm {
namespace shared {
namespace {

void* memory_of(const at::Tensor& t) {
  TORCH_CHECK_VALUE(
      t.device().is_cpu() && t.scalar_type() == at::kByte && t.is_contiguous(),
      "expected a contiguous uint8 CPU tensor, got ", t.scalar_type(), " ", t.sizes(),
      " on ", t.device());
  TORCH_CHECK_VALUE(reinterpret_cast<uintptr_t>(t.data_ptr()) % 8 == 0,
                    "expected memory aligned to 8 bytes");
  return t.data_ptr();
}

std::vector<Entry> entries_of(const std::vector<std::string>& names,
                              const Tensors& leaves) {
  std::vector<Entry> entries;
  for (size_t i = 0; i < names.size(); ++i) {
    const at::Tensor& leaf = leaves.at(i);
    TORCH_CHECK_VALUE(leaf.device().is_cpu() && leaf.is_contiguous(), "entry ",
                      names[i], ": expected a contiguous CPU tensor");
    entries.push_back({names[i], leaf.data_ptr(), leaf.nbytes()});
  }
  return entries;
}

// Who holds the lock, for the message. /proc/<pid>/stat is "pid (name) state …".
std::string describe(int64_t pid) {
  std::ostringstream text;
  text << "process " << pid;
  std::ifstream stream("/proc/" + std::to_string(pid) + "/stat");
  std::string stat;
  std::getline(stream, stat);
  const size_t open = stat.find('(');
  const size_t close = stat.rfind(')');
  if (open != std::string::npos && close != std::string::npos &&
      close + 2 < stat.size()) {
    text << ' ' << stat.substr(open, close + 1 - open);
    const char state = stat[close + 2];
    if (state == 'T' || state == 't') {
      text << ", which is stopped: continue it with `kill -CONT " << pid
           << "`, or kill it";
    }
  } else {
    text << ", which does not exist here any more";
  }
  return text.str();
}

}  // namespace

int64_t SharedState::size_for(const std::vector<std::string>& names,
                              const Tensors& leaves, const std::string& note) {
  return static_cast<int64_t>(Control::size_for(entries_of(names, leaves), note));
}

void SharedState::init(const at::Tensor& control, const std::string& note) {
  Control::init(memory_of(control), control.nbytes(), note);
}

SharedState::SharedState(at::Tensor control, std::vector<std::string> names,
                         Tensors leaves)
    : memory_(std::move(control)),
      names_(std::move(names)),
      leaves_(std::move(leaves)) {
  // They outlive an inference_mode block that they may be made in.
  const c10::InferenceMode off(false);
  for (const at::Tensor& leaf : leaves_) {
    // Of a memory map too, a plain tensor of memory of our own.
    copies_.push_back(at::empty(leaf.sizes(), leaf.scalar_type()));
    values_.push_back(copies_.back().data_ptr());
  }
  follow();
}

void SharedState::follow() {
  bool moved = !control_.has_value() || memory_.data_ptr() != addresses_.back();
  for (size_t i = 0; i < leaves_.size() && !moved; ++i) {
    moved = leaves_[i].data_ptr() != addresses_[i];
  }
  if (moved) {
    control_.emplace(memory_of(memory_), memory_.nbytes(), entries_of(names_, leaves_));
    addresses_.clear();
    for (const at::Tensor& leaf : leaves_) {
      addresses_.push_back(leaf.data_ptr());
    }
    addresses_.push_back(memory_.data_ptr());
  }
}

bool SharedState::try_acquire() {
  follow();
  return control_->try_lock();
}

void SharedState::acquire(double seconds) {
  if (try_acquire()) {
    return;
  }
  // In slices: an interrupt is heard while waiting.
  constexpr double slice = 0.2;
  for (double waited = 0; waited < seconds; waited += slice) {
    bool taken = false;
    {
      // Whoever holds it may be a thread that waits for the GIL.
      pybind11::gil_scoped_release no_gil;
      taken = control_->lock(std::min(slice, seconds - waited));
    }
    if (PyErr_CheckSignals() != 0) {
      if (taken) {
        release();
      }
      throw pybind11::error_already_set();
    }
    if (taken) {
      return;
    }
  }
  std::ostringstream text;
  text << "VecNorm: the lock of the shared statistics was not given back for "
       << seconds << " s by " << describe(control_->owner());
  PyErr_SetString(PyExc_TimeoutError, text.str().c_str());
  throw pybind11::error_already_set();
}

void SharedState::load() {
  for (size_t i = 0; i < leaves_.size(); ++i) {
    std::memcpy(copies_[i].data_ptr(), leaves_[i].data_ptr(), leaves_[i].nbytes());
  }
}

void SharedState::commit() { control_->commit(values_); }

}  // namespace shared
}  // namespace vecnorm
