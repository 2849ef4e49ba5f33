// Copyright (c) the torchrl_vecnorm authors.
//
// This source code is licensed under the MIT license found in the
// LICENSE file in the root directory of this source tree.

// Rewards, the discounted returns that they add up to, and the moments of these, as
// kernels see them; host and device. A step of a return is in step_return.inl.

#pragma once

#include <limits>

#include "key.h"
#include "moments.h"

namespace vecnorm {

// No value: statistics leave it out.
constexpr double kNone = std::numeric_limits<double>::quiet_NaN();

// How a return goes on from step to step, and where an episode's end clears it: before
// the step's reward is added, or after the statistics have seen it.
struct Discount {
  double gamma;
  bool clears_before;
};

// A key of rewards: `x` are the rewards, `y` what they are scaled to.
struct Returns {
  Key key;
  const bool* done = nullptr;  // [samples]
  Leaf returns;                // [samples, features], dense
};

// What the returns of a feature are summed around: their running mean, or, while there
// is none, a first reward that counts, which returns begin with. `first` is that of the
// first row.
VECNORM_HD double shift_of_returns(const Key& key, int64_t f, double first,
                                   Weights weights) {
  const Moments state = read_state(key.state, f);
  const bool holds = anchored(state.used, static_cast<double>(key.samples), weights);
  const bool counts = key.mask == nullptr || key.mask[0];
  const double shift = holds ? state.near_loc() : counts ? first : 0.;
  return usable(shift) ? shift : 0.;
}

// Folds a batch's sums of one feature into the state, but for the count, which the
// features share. Returns the moments as they are read from now on.
VECNORM_HD Moments fold_sums(const State& to, int64_t f, int64_t features, Partial sums,
                             double shift, double samples, Weights weights) {
  const Moments state = read_state(to, f);
  if (!(samples > 0)) {
    return state;
  }
  Moments batch = unshift(sums, shift, samples);
  const double left_out = batch.missing;
  if (to.nonfinite.data == nullptr) {
    batch = impute(batch, state);
  }
  const Moments folded = rounded(to, fold(state, batch, weights));
  write_state(to, f, features, folded, left_out);
  return folded;
}

// The count, once all features have been folded.
VECNORM_HD void fold_count(const State& to, double samples, Weights weights) {
  if (samples > 0) {
    to.write_count(weights.keep * to.count.read(0) + weights.weight * samples, samples);
  }
}

}  // namespace vecnorm
