// Copyright (c) the torchrl_vecnorm authors.
//
// This source code is licensed under the MIT license found in the
// LICENSE file in the root directory of this source tree.

// Chooses the instruction set once, when the first call comes. ATEN_CPU_CAPABILITY
// (default, avx2, avx512) limits it, as it does torch's own kernels.

#include "kernels.h"

#include <cstdlib>
#include <string>

#include "isa.h"

namespace vecnorm {
namespace cpu {
namespace {

struct Kernels {
  decltype(&baseline::update) update;
  decltype(&baseline::normalize) normalize;
  decltype(&baseline::denormalize) denormalize;
  decltype(&baseline::scale_returns) scale_returns;
};

Kernels choose() {
#ifdef __x86_64__
  const char* set = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string limit = set != nullptr ? set : "";
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 =
      avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && limit != "default" && limit != "avx2") {
    return {avx512::update, avx512::normalize, avx512::denormalize,
            avx512::scale_returns};
  }
  if (avx2 && limit != "default") {
    return {avx2::update, avx2::normalize, avx2::denormalize, avx2::scale_returns};
  }
#endif
  return {baseline::update, baseline::normalize, baseline::denormalize,
          baseline::scale_returns};
}

const Kernels& kernels() {
  static const Kernels chosen = choose();
  return chosen;
}

}  // namespace

void update(const std::vector<Key>& keys, Weights weights, const Rule& rule,
            RunPhases run) {
  kernels().update(keys, weights, rule, run);
}

void normalize(const std::vector<Key>& keys, const Rule& rule, RunPhases run) {
  kernels().normalize(keys, rule, run);
}

void denormalize(const std::vector<Key>& keys, const Rule& rule, RunPhases run) {
  kernels().denormalize(keys, rule, run);
}

void scale_returns(const Returns& of, Discount by, Weights weights, const Rule& rule,
                   RunPhases run) {
  kernels().scale_returns(of, by, weights, rule, run);
}

void merge(const State& state, const State& batch, int64_t features, Weights weights) {
  baseline::merge(state, batch, features, weights);
}

}  // namespace cpu
}  // namespace vecnorm
