// Copyright (c) the torchrl_vecnorm authors.
//
// This source code is licensed under the MIT license found in the
// LICENSE file in the root directory of this source tree.

// Batches as numbers that add up, on the CPU: what torchrl_vecnorm/totals.py does in
// plain torch, each half in one pass. A call of small batches would take several times
// as long in its operators as in the all-reduce between them.

#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace vecnorm {

// Puts a call of this rank into the tensor that is reduced.
//
//   buffer    [6 + keys + 3 * features, or more]
//                         float64: header, counts, missing, Σ d, Σ d², of all keys each
//   expected  [6]         the header when all is well: its first two elements count on
//   shift     [features]  d = x - shift
//   batches   five leaves of each key, as in ops.cpp
//
// A rank that `asks` or has `refused` says so in the last elements of the header.
void write_totals(const at::Tensor& buffer, const at::Tensor& expected,
                  const at::Tensor& shift, at::TensorList batches, bool asks,
                  bool refused);

// The moments of all that was added, five leaves of each key, whose features have the
// shapes of `like`. The next shift is their mean.
std::vector<at::Tensor> read_totals(const at::Tensor& buffer, const at::Tensor& shift,
                                    at::TensorList like);

}  // namespace vecnorm
