// Copyright (c) the torchrl_vecnorm authors.
//
// This source code is licensed under the MIT license found in the
// LICENSE file in the root directory of this source tree.

// The kernels of each instruction set, and which of them runs.

#pragma once

#include "kernels.h"

namespace vecnorm {
namespace cpu {

#define VECNORM_DECLARE_ISA(isa)                                                   \
  namespace isa {                                                                  \
  void update(const std::vector<Key>& keys, Weights weights, const Rule& rule,     \
              RunPhases run);                                                      \
  void normalize(const std::vector<Key>& keys, const Rule& rule, RunPhases run);   \
  void denormalize(const std::vector<Key>& keys, const Rule& rule, RunPhases run); \
  void scale_returns(const Returns& of, Discount by, Weights weights,              \
                     const Rule& rule, RunPhases run);                             \
  void merge(const State& state, const State& batch, int64_t features,             \
             Weights weights);                                                     \
  }
VECNORM_DECLARE_ISA(baseline)
#ifdef __x86_64__
VECNORM_DECLARE_ISA(avx2)
VECNORM_DECLARE_ISA(avx512)
#endif
#undef VECNORM_DECLARE_ISA

}  // namespace cpu
}  // namespace vecnorm
