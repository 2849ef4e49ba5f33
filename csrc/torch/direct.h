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

#include <initializer_list>
#include <optional>
#include <vector>

#include "../key.h"
#include "tensors.h"

namespace vecnorm {

// Whether the dispatcher would do nothing but call the kernel: no mode, no trace, no
// transform, no profiler.
bool nobody_listens();

// Whether all that the dispatcher would do is to call the CPU kernel: of tensors that
// may be part of a graph, and of others.
bool is_usual(std::initializer_list<TensorList> in_graphs,
              std::initializer_list<TensorList> others);

// States on the CPU, checked once.
class Direct {
 public:
  // None where the states are not on the CPU. Throws what the operators throw.
  static std::optional<Direct> of(TensorList state);

  // The normalised values, or none where an operator has to be called: it may go on
  // from there, or say what is wrong. Nothing has happened then. A value that is not
  // defined is left out, as its result is; of the masks, those that are say which
  // samples count.
  // `open` is called right before the state is written, which is left as it is where it
  // says no.
  template <typename Open>
  std::optional<std::vector<Tensor>> update(const std::vector<Tensor>& x,
                                            const std::vector<Tensor>& mask,
                                            double keep, double weight, double eps,
                                            const Open& open) const {
    std::optional<Call> call = prepare_update(x, mask, keep, weight, eps);
    if (!call.has_value() || !open()) {
      return std::nullopt;
    }
    run_update(*call, x, keep, weight, eps);
    return std::move(call->y);
  }
  std::optional<std::vector<Tensor>> normalize(const std::vector<Tensor>& x,
                                               double eps) const;

 private:
  // The keys of a call, and what they need.
  struct Call {
    std::vector<Key> keys;
    std::vector<Tensor> y;
    std::vector<Tensor> masks;
  };

  explicit Direct(TensorList state);
  // Whether the leaves are where they were: set_() and share_memory_() move them.
  bool in_place() const;
  bool lies_apart(const Tensor& x) const;
  bool is_usual(const Tensor& x, size_t i) const;
  std::optional<Call> prepare(const std::vector<Tensor>& x,
                              const std::vector<Tensor>& mask, double eps) const;
  std::optional<Call> prepare_update(const std::vector<Tensor>& x,
                                     const std::vector<Tensor>& mask, double keep,
                                     double weight, double eps) const;
  void run_update(const Call& call, const std::vector<Tensor>& x, double keep,
                  double weight, double eps) const;

  std::vector<Tensor> leaves_;
  std::vector<State> states_;
  std::vector<Span> spans_;  // of the leaves, in their order in memory
};

}  // namespace vecnorm
