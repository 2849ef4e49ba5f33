// Copyright (c) the torchrl_vecnorm authors.
//
// This source code is licensed under the MIT license found in the
// LICENSE file in the root directory of this source tree.

// Rewards to run kernels on, and what they should give, in long double. For cpu_host/
// and cuda_host/.

#pragma once

#include <vector>

#include "csrc/returns.h"
#include "tests/cases.h"

namespace vecnorm {

struct ReturnsCase {
  int64_t envs;
  int64_t features;
  Dtype dtype = Dtype::kFloat32;
  bool masked = false;
  bool clears_before = false;
  bool float_returns = false;
};

inline std::vector<ReturnsCase> returns_cases(bool small) {
  std::vector<ReturnsCase> all;
  for (bool before : {false, true}) {
    all.push_back({1, 1, Dtype::kFloat32, false, before});
    all.push_back({300, 1, Dtype::kFloat32, true, before});
    all.push_back({70, 3, Dtype::kFloat64, true, before});
    all.push_back({5000, 1, Dtype::kFloat32, false, before});
  }
  all.push_back({200, 1, Dtype::kBFloat16});
  all.push_back({200, 2, Dtype::kInt32});
  all.push_back({5001, 2, Dtype::kFloat32, true, false, true});
  if (!small) {
    all.push_back({150000, 1});
    all.push_back({20000, 3, Dtype::kFloat16, true});
  }
  return all;
}

// `call` scales rewards: a few steps of it are compared with long double.
template <typename Call>
void check_returns(const ReturnsCase& of, const Call& call) {
  constexpr double kGamma = 0.9;
  constexpr double kKeep = 0.95;
  const Rule rule = Rule::of(1e-8, EpsMode::kVarAdd, 3, false);
  Case c = make("returns", of.envs, of.features, of.dtype);
  c.masked = of.masked;
  c.spoiled = of.dtype == Dtype::kInt32 ? 0 : 0.02;
  c.loc = 0.5;
  c.eps_mode = EpsMode::kVarAdd;
  c.eps = 1e-8;
  c.clip = 3;
  c.center = false;
  Buffers b(c);
  const auto size = static_cast<size_t>(of.envs * of.features);
  Guarded<bool> done(of.envs);
  Guarded<double> returns(size);
  std::vector<long double> want(size);
  const auto kept = [&](size_t i) {
    return of.float_returns ? reinterpret_cast<float*>(returns.data())[i] : returns[i];
  };
  for (int step = 0; step < 3; ++step) {
    b.fill();
    for (int64_t e = 0; e < of.envs; ++e) {
      done[e] = random_bits() % 8 == 0;
    }
    Returns r;
    r.key = b.key();
    r.done = done.data();
    r.returns = {returns.data(), of.float_returns ? Dtype::kFloat32 : Dtype::kFloat64};
    int64_t n = 0;
    for (int64_t e = 0; e < of.envs; ++e) {
      n += !of.masked || b.mask[e];
    }
    for (int64_t f = 0; f < of.features && n > 0; ++f) {
      long double s1 = 0;
      long double s2 = 0;
      long double used = 0;
      for (int64_t e = 0; e < of.envs; ++e) {
        if (of.masked && !b.mask[e]) {
          continue;
        }
        long double& g = want[e * of.features + f];
        const double reward = b.get(b.x, of.dtype, e, f);
        g = of.clears_before && done[e] ? 0 : kGamma * g;
        if (std::isfinite(reward)) {
          g += reward;
          s1 += g;
          s2 += g * g;
          used += 1;
        }
        g = !of.clears_before && done[e] ? 0 : g;
      }
      b.want_sum[f] = kKeep * b.want_sum[f] + s1;
      b.want_ssq[f] = kKeep * b.want_ssq[f] + s2;
      b.want_finite[f] = kKeep * b.want_finite[f] + used;
      b.want_left_out[f] += n - used;
    }
    if (n > 0) {
      b.want_count = kKeep * b.want_count + n;
      b.want_seen += n;
    }
    call(r, Discount{kGamma, of.clears_before}, Weights{kKeep, 1}, rule);
    b.compare();
    for (size_t i = 0; i < size; ++i) {
      b.near("returns", static_cast<int64_t>(i), 0, kept(i), want[i],
             of.float_returns ? 1e-5 : 1e-12);
    }
    if (!done.intact() || !returns.intact()) {
      b.fail("a write outside of the memory", 0, 0, 0, 0);
    }
  }
}

}  // namespace vecnorm
