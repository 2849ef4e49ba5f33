// Copyright (c) the torchrl_vecnorm authors.
//
// This source code is licensed under the MIT license found in the
// LICENSE file in the root directory of this source tree.

// The operators as typed dispatcher calls, for the Python binding. Their schemas and
// semantics are in ops.cpp.

#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

namespace vecnorm {

// How a call normalises, as operators take it: where eps stands is an EpsMode of
// moments.h, for all keys.
struct RuleArgs {
  double eps;
  int64_t eps_mode = 0;
  std::optional<double> clip = std::nullopt;
  bool center = true;
};

// Typed calls of the operators: through the dispatcher, but for those of plain CPU
// tensors where it would do nothing else (direct.h).
void update(at::TensorList x, at::TensorList state, at::TensorList y,
            at::TensorList mask, double keep, double weight, const RuleArgs& rule);

std::vector<at::Tensor> normalize(at::TensorList x, at::TensorList state,
                                  const RuleArgs& rule);

void normalize_out(at::TensorList x, at::TensorList state, at::TensorList y,
                   const RuleArgs& rule);

std::vector<at::Tensor> moments(at::TensorList x, int64_t feature_ndim,
                                at::TensorList mask);

void merge(at::TensorList state, at::TensorList other, double keep, double weight);

// Runs what normalises x into y by the state, and connects those that need gradients.
void run_with_gradients(at::TensorList x, at::TensorList y, at::TensorList state,
                        const RuleArgs& rule, const std::function<void()>& run);

// See returns.cpp.
void scale_returns(at::TensorList x, at::TensorList done, at::TensorList returns,
                   at::TensorList state, at::TensorList y, at::TensorList mask,
                   double gamma, bool clears_before, double keep, const RuleArgs& rule);

// New tensors for normalised values: integers come out in the default dtype.
at::Tensor output_like(const at::Tensor& x);
std::vector<at::Tensor> outputs_like(at::TensorList x);

// In builds with CUDA kernels, for tests and benchmarks: which of them update() is to
// take where it can, and which it took last.
void set_cuda_path(const std::string& name);
std::string last_cuda_path();
// What the current GPU runs at once, in words.
std::string cuda_limits();

}  // namespace vecnorm
