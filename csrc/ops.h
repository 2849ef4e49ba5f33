// Copyright (c) the torchrl_vecnorm authors.
//
// This source code is licensed under the MIT license found in the
// LICENSE file in the root directory of this source tree.

// The operators as typed dispatcher calls, for the Python binding. Their schemas and
// semantics are in ops.cpp.

#pragma once

#include <ATen/core/Tensor.h>

#include <string>

namespace vecnorm {

void update(at::TensorList x, at::TensorList sum, at::TensorList ssq,
            at::TensorList count, at::TensorList nonfinite, at::TensorList y,
            at::TensorList mask, double keep, double weight, double eps);

void normalize(at::TensorList x, at::TensorList sum, at::TensorList ssq,
               at::TensorList count, at::TensorList nonfinite, at::TensorList y,
               double eps);

void denormalize(at::TensorList y, at::TensorList sum, at::TensorList ssq,
                 at::TensorList count, at::TensorList nonfinite, at::TensorList x,
                 double eps);

void merge(at::TensorList sum, at::TensorList ssq, at::TensorList count,
           at::TensorList nonfinite, at::TensorList other_sum, at::TensorList other_ssq,
           at::TensorList other_count, at::TensorList other_nonfinite, double keep,
           double weight);

// In a forked child the thread pool of its parent is gone, and whatever would use it, a
// copy of torch's too, waits for it for ever. The operators call this themselves.
void leave_the_pool_after_fork();

// In builds with CUDA kernels, for tests and benchmarks: which of them update() is to
// take where it can, and which it took last.
void set_cuda_path(const std::string& name);
std::string last_cuda_path();

}  // namespace vecnorm
