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

// One tensor of a state, float64 or float32.
struct Leaf {
  void* data = nullptr;  // null: the state has no such leaf
  Dtype dtype = Dtype::kFloat64;
  bool has_seen = false;  // of a count: how many samples were ever seen comes after it

  VECNORM_HD double read(int64_t i) const {
    return dtype == Dtype::kFloat64
               ? static_cast<const double*>(data)[i]
               : static_cast<double>(static_cast<const float*>(data)[i]);
  }

  VECNORM_HD void write(int64_t i, double value) const {
    if (dtype == Dtype::kFloat64) {
      static_cast<double*>(data)[i] = value;
    } else {
      static_cast<float*>(data)[i] = static_cast<float>(value);
    }
  }

  // As it would be read after write().
  VECNORM_HD double rounded(double value) const {
    return dtype == Dtype::kFloat64 ? value : static_cast<float>(value);
  }
};

// The state of one key. `sum` and `ssq` are [features], `count` is [1], or [2] with the
// number of samples that were ever seen, which does not decay; `nonfinite` is
// [2, features]: of the samples in `count` those whose value was left out, and how many
// values were left out so far, which does not decay. `central` is [features], the
// variance. The last two are optional.
struct State {
  Leaf sum;
  Leaf ssq;
  Leaf count;
  Leaf nonfinite;
  Leaf central;

  // Takes in a batch of so many samples, with the count that is folded already.
  VECNORM_HD void write_count(double folded, double samples) const {
    count.write(0, folded);
    if (count.has_seen) {
      count.write(1, count.read(1) + samples);
    }
  }

  VECNORM_HD Rounding rounding() const {
    const bool in_double = sum.dtype == Dtype::kFloat64 && ssq.dtype == Dtype::kFloat64;
    return Rounding::of(in_double, central.data != nullptr);
  }
};

// Moments whose leaves were read: how many values are behind them, and their variance.
VECNORM_HD void settle(const State& s, Moments* m) {
  m->weigh();
  m->var =
      s.central.data != nullptr ? kept_var(m->var, *m, s.rounding()) : m->var_of_sums();
}

VECNORM_HD Moments read_state(const State& s, int64_t f) {
  Moments m;
  m.sum = s.sum.read(f);
  m.ssq = s.ssq.read(f);
  m.count = s.count.read(0);
  m.missing = s.nonfinite.data != nullptr ? s.nonfinite.read(f) : 0.;
  m.var = s.central.data != nullptr ? s.central.read(f) : 0.;
  settle(s, &m);
  return m;
}

// Moments as they would be read after they were written.
VECNORM_HD Moments rounded(const State& s, Moments m) {
  m.sum = s.sum.rounded(m.sum);
  m.ssq = s.ssq.rounded(m.ssq);
  m.count = s.count.rounded(m.count);
  m.missing = s.nonfinite.data != nullptr ? s.nonfinite.rounded(m.missing) : 0.;
  m.var = s.central.rounded(m.var);
  settle(s, &m);
  return m;
}

// Writes all but `count`, which the features of a key share.
VECNORM_HD void write_state(const State& s, int64_t f, int64_t features,
                            const Moments& m, double left_out) {
  s.sum.write(f, m.sum);
  s.ssq.write(f, m.ssq);
  if (s.nonfinite.data != nullptr) {
    s.nonfinite.write(f, m.missing);
    s.nonfinite.write(features + f, s.nonfinite.read(features + f) + left_out);
  }
  if (s.central.data != nullptr) {
    s.central.write(f, m.var);
  }
}

struct Key {
  Matrix x;
  Matrix y;                    // y.data is null where only the moments are wanted
  const bool* mask = nullptr;  // [samples], null: every sample counts
  State state;
  int64_t samples = 0;
  int64_t features = 0;
};

}  // namespace vecnorm
