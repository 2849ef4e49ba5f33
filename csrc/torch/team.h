// Copyright (c) the torchrl_vecnorm authors.
//
// This source code is licensed under the MIT license found in the
// LICENSE file in the root directory of this source tree.

// The threads that run a call of the CPU kernels.

#pragma once

#include <cstdint>
#include <vector>

#include "../cpu/kernels.h"

namespace vecnorm {

// Runs the phases of a call that looks at `values` of them in all: on torch's team of
// threads, or on the calling one alone while that is quicker.
void run_phases(const std::vector<cpu::Phase>& phases, int64_t values);

// In a forked child the thread pool of its parent is gone, and whatever would use it, a
// copy of torch's too, waits for it for ever. The operators call this themselves.
void leave_the_pool_after_fork();

}  // namespace vecnorm
