// Copyright (c) the torchrl_vecnorm authors.
//
// This source code is licensed under the MIT license found in the
// LICENSE file in the root directory of this source tree.

// Rewards and their returns as the kernels take them: checks, and keys.

#pragma once

#include <vector>

#include "../returns.h"
#include "tensors.h"

namespace vecnorm {

// The tensors of a call, as returns.cpp describes them.
struct ReturnsArgs {
  TensorList x;
  TensorList done;
  TensorList returns;
  States state;
  TensorList y;
  TensorList mask;
};

inline void check_apart_from(const Tensor& t, size_t i, const char* what,
                             const Span& returns, size_t j) {
  TORCH_CHECK_VALUE(!Span(t).meets(returns, t), "key ", i, ": expected ", what,
                    " apart from the returns of key ", j, ", got memory of them");
}

// All that can be wrong with a call, before anything is written.
inline void check_returns(const ReturnsArgs& a, double gamma, double keep) {
  TORCH_CHECK_VALUE(0 <= gamma && gamma <= 1, "expected gamma in [0, 1], got ", gamma);
  const Apart apart = check_update(a.x, a.y, a.mask, a.state, keep, 1);
  check_length(a.done, a.x.size(), "done", false);
  check_length(a.returns, a.x.size(), "returns", false);
  for (size_t i = 0; i < a.x.size(); ++i) {
    const Tensor& returns = a.returns[i];
    check_leaf(returns, i, "returns");
    TORCH_CHECK_VALUE(returns.sizes() == a.x[i].sizes(), "key ", i,
                      ": expected returns of the shape of the rewards, ",
                      a.x[i].sizes(), ", got ", returns.sizes());
    const at::IntArrayRef samples =
        a.x[i].sizes().slice(0, a.x[i].dim() - a.state.sum(i).dim());
    TORCH_CHECK_VALUE(
        a.done[i].scalar_type() == at::kBool && is_mask_of(a.done[i], samples), "key ",
        i, ": expected bool dones of shape ", samples, ", one element a sample, got ",
        a.done[i].scalar_type(), " ", a.done[i].sizes());
    apart.check(returns, i, "returns");
    apart.check(a.done[i], i, "dones");
    if (has(a.mask, i)) {
      apart.check(a.mask[i], i, "a mask");
    }
  }
  for (size_t j = 0; j < a.x.size(); ++j) {
    const Span returns(a.returns[j]);
    for (size_t i = 0; i < a.x.size(); ++i) {
      check_apart_from(a.x[i], i, "rewards", returns, j);
      check_apart_from(a.done[i], i, "dones", returns, j);
      if (has(a.y, i)) {
        check_apart_from(a.y[i], i, "an output", returns, j);
      }
      if (has(a.mask, i)) {
        check_apart_from(a.mask[i], i, "a mask", returns, j);
      }
      if (i != j) {
        check_apart_from(a.returns[i], i, "returns", returns, j);
      }
    }
  }
}

// The keys of a call for the kernels.
struct ReturnsKeys {
  Keys values;
  std::vector<Returns> keys;

  explicit ReturnsKeys(const ReturnsArgs& a)
      : values(a.x, a.y, a.mask, a.state), keys(a.x.size()) {
    for (size_t i = 0; i < keys.size(); ++i) {
      keys[i].key = values.keys[i];
      keys[i].returns = leaf_of(a.returns[i]);
      const Tensor& done = values.alive.emplace_back(a.done[i].contiguous());
      keys[i].done = done.data_ptr<bool>();
    }
  }
};

}  // namespace vecnorm
