// Copyright (c) the torchrl_vecnorm authors.
//
// This source code is licensed under the MIT license found in the
// LICENSE file in the root directory of this source tree.

// The kernels for what every processor of the platform has: SSE2, NEON.

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "isa.h"
#include "plan.h"

#define VECNORM_ISA baseline
constexpr int64_t kPackBytes = 16;
#include "kernels.inl"
