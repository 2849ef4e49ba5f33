// Copyright (c) the torchrl_vecnorm authors.
//
// This source code is licensed under the MIT license found in the
// LICENSE file in the root directory of this source tree.

// What the operators' autograd kernels share.

#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/graph_task.h>

#include <initializer_list>

#include "tensors.h"

namespace vecnorm {

// Runs an operator below autograd. What a graph has saved must not be used by its
// backward pass once it was written to.
template <typename Call>
void run_below_autograd(std::initializer_list<TensorList> mutated, const Call& call) {
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    call();
  }
  for (TensorList list : mutated) {
    for (const Tensor& t : list) {
      if (!t.is_inference()) {
        t.unsafeGetTensorImpl()->bump_version();
      }
    }
  }
}

// torch.utils.checkpoint runs the forward pass again within the backward pass, with
// gradients, which hooks do not have. Its updates would count twice, and y would not be
// the one whose gradient is wanted.
inline void refuse_recomputation() {
  TORCH_CHECK(
      !at::GradMode::is_enabled() || torch::autograd::get_current_graph_task_id() == -1,
      "torchrl_vecnorm: expected updates of the statistics in forward passes only, got "
      "one in a backward pass: does torch.utils.checkpoint run the forward pass again? "
      "Normalise before the function that is checkpointed, or freeze the statistics "
      "in it");
}

}  // namespace vecnorm
