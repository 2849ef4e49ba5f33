// Copyright (c) the torchrl_vecnorm authors.
//
// This source code is licensed under the MIT license found in the
// LICENSE file in the root directory of this source tree.

// The CPU backend: each function takes all keys of a call.

#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "../key.h"
#include "../moments.h"
#include "../returns.h"

namespace vecnorm {
namespace cpu {

// A step of a call: `body` takes the parts [begin, end).
struct Phase {
  int64_t parts;
  std::function<void(int64_t begin, int64_t end)> body;
};

// Runs phases one after the other, each on any number of threads that share its parts:
// none begins before the one before it has ended everywhere. `values` says how much
// work they are.
using RunPhases = void (*)(const std::vector<Phase>& phases, int64_t values);

// Folds each key's batch into its state and writes y with the new statistics.
void update(const std::vector<Key>& keys, Weights weights, const Rule& rule,
            RunPhases run);

// y = (x - loc) / scale with the statistics as they are, clipped.
void normalize(const std::vector<Key>& keys, const Rule& rule, RunPhases run);

// The inverse: y = x * scale + loc, of x clipped.
void denormalize(const std::vector<Key>& keys, const Rule& rule, RunPhases run);

// The returns go on by a step, their moments are folded into the state, and rewards are
// divided by the scale: y = r / scale, clipped.
void scale_returns(const Returns& of, Discount by, Weights weights, const Rule& rule,
                   RunPhases run);

// state = keep * state + weight * batch, for moments that are already summed.
void merge(const State& state, const State& batch, int64_t features, Weights weights);

}  // namespace cpu
}  // namespace vecnorm
