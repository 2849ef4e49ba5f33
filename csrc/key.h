// Copyright (c) the torchrl_vecnorm authors.
//
// This source code is licensed under the MIT license found in the
// LICENSE file in the root directory of this source tree.

// One key of a call as the kernels see it: pointers, strides and types.

#pragma once

#include <cstdint>

#include "dtypes.h"

namespace vecnorm {

// A [samples, features] view; strides count elements.
struct Matrix {
  void* data = nullptr;
  Dtype dtype = Dtype::kFloat32;
  int64_t row_stride = 0;
  int64_t feature_stride = 1;
};

// The state of one key. `sum` and `ssq` are [features], `count` is [1]; `nonfinite` is
// [2, features]: of the samples in `count` those whose value was left out, and how many
// values were left out so far, which does not decay.
struct State {
  void* sum = nullptr;
  void* ssq = nullptr;
  void* count = nullptr;
  double* nonfinite = nullptr;  // null: the state has no such counter
  Dtype sum_dtype = Dtype::kFloat64;
  Dtype ssq_dtype = Dtype::kFloat64;
  Dtype count_dtype = Dtype::kFloat64;
};

struct Key {
  Matrix x;
  Matrix y;                    // y.data is null where only the moments are wanted
  const bool* mask = nullptr;  // [samples], null: every sample counts
  State state;
  int64_t samples = 0;
  int64_t features = 0;
};

}  // namespace vecnorm
