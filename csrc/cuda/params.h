// Copyright (c) the torchrl_vecnorm authors.
//
// This source code is licensed under the MIT license found in the
// LICENSE file in the root directory of this source tree.

// What a launch hands to its kernel.

#pragma once

#include "../key.h"
#include "../moments.h"
#include "plan.h"

namespace vecnorm {
namespace cuda {

// n / divisor for 0 <= n < 2³¹ without a division: a product with 2^shift / divisor,
// which is rounded up by so little that it does not show.
struct Divisor {
  uint32_t multiplier = 0;
  int32_t shift = 0;

  static Divisor of(int divisor) {
    Divisor d;
    d.shift = 31;
    while (int64_t{1} << (d.shift - 31) < divisor) {
      ++d.shift;
    }
    d.multiplier = static_cast<uint32_t>(((int64_t{1} << d.shift) - 1) / divisor + 1);
    return d;
  }

  VECNORM_HD int divide(int n) const {
    return static_cast<int>((static_cast<uint64_t>(n) * multiplier) >> shift);
  }
};

struct DeviceKey {
  Key key;
  LanePlan plan;
  Divisor by_inner;     // what its blocks count through first: slabs, or chunks
  Divisor by_features;  // of a slab
  double* partials;     // [slabs][chunks][values]: what each block has found
  unsigned* counters;   // one a slab, then one for the key
};

struct Params {
  DeviceKey keys[kMaxKeys];
  int ends[kMaxKeys];  // the blocks of keys 0 … i
  int size;
  int slots;  // vectors that a thread of a fused kernel keeps in shared memory
  Weights weights;
  Rule rule;
  float
      float_limit;  // its clip: a constant operand, where a conversion takes a register
  SharedSize shared;
  int shared_bytes;  // before the vectors
};

static_assert(sizeof(Params) <= 4096, "kernel arguments are limited to 4 KB");

}  // namespace cuda
}  // namespace vecnorm
