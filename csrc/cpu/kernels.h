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

namespace vecnorm {
namespace cpu {

// Runs body(begin, end) over disjoint parts of [0, n), possibly on several threads.
using Body = std::function<void(int64_t begin, int64_t end)>;
using ParallelFor = void (*)(int64_t n, const Body& body);

// Folds each key's batch into its state and writes y with the new statistics.
void update(const std::vector<Key>& keys, Weights weights, double eps,
            ParallelFor parallel_for);

// y = (x - loc) / scale with the statistics as they are.
void normalize(const std::vector<Key>& keys, double eps, ParallelFor parallel_for);

// The inverse: y = x * scale + loc.
void denormalize(const std::vector<Key>& keys, double eps, ParallelFor parallel_for);

// state = keep * state + weight * batch, for moments that are already summed.
void merge(const State& state, const State& batch, int64_t features, Weights weights);

}  // namespace cpu
}  // namespace vecnorm
