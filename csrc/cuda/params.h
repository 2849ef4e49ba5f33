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

struct DeviceKey {
  Key key;
  LanePlan plan;
  double* partials;    // [slabs][chunks][values]: what each block has found
  unsigned* counters;  // one a slab, then one for the key
};

struct Params {
  DeviceKey keys[kMaxKeys];
  int ends[kMaxKeys];  // the blocks of keys 0 … i
  int size;
  int slots;  // vectors that a thread of a fused kernel keeps in shared memory
  Weights weights;
  double eps;
  SharedSize shared;
  int shared_bytes;  // before the vectors
};
static_assert(sizeof(Params) <= 4096, "kernel arguments are limited to 4 KB");

}  // namespace cuda
}  // namespace vecnorm
