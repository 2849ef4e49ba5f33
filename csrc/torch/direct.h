// Copyright (c) the torchrl_vecnorm authors.
//
// This source code is licensed under the MIT license found in the
// LICENSE file in the root directory of this source tree.

// The CPU kernels for tensors that are as usual, without the dispatcher: nothing
// listens to it then, and its way through autograd and the checks of states that were
// checked before take as long as the update of a small batch, and several times that
// where their code is not in the caches.

#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "../key.h"
#include "tensors.h"

namespace vecnorm {

// States on the CPU, checked once.
class Direct {
 public:
  // None where the states are not on the CPU. Throws what the operators throw.
  static std::optional<Direct> of(TensorList state);

  // The normalised values, or none where an operator has to be called: it may go on
  // from there, or say what is wrong. Nothing has happened then.
  std::optional<std::vector<Tensor>> update(const std::vector<Tensor>& x, double keep,
                                            double eps) const;
  std::optional<std::vector<Tensor>> normalize(const std::vector<Tensor>& x,
                                               double eps) const;

 private:
  explicit Direct(TensorList state);
  bool is_usual(const std::vector<Tensor>& x, double eps) const;
  // Whether the leaves are where they were: set_() and share_memory_() move them.
  bool in_place() const;
  bool lies_apart(const Tensor& x) const;
  bool keys_of(const std::vector<Tensor>& x, const std::vector<Tensor>& y,
               std::vector<Key>* keys) const;

  std::vector<Tensor> leaves_;
  std::vector<State> states_;
  std::vector<Span> spans_;  // of the leaves, in their order in memory
};

}  // namespace vecnorm
