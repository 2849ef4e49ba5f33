// Copyright (c) the torchrl_vecnorm authors.
//
// This source code is licensed under the MIT license found in the
// LICENSE file in the root directory of this source tree.

// The shape of a launch.

#pragma once

#include <cstddef>

namespace vecnorm {
namespace cuda {

struct Launch {
  int blocks = 0;
  int threads = 0;
  size_t shared = 0;         // bytes a block
  int cluster = 1;           // blocks that share their shared memory
  bool cooperative = false;  // refused unless all blocks can be there at once
};

}  // namespace cuda
}  // namespace vecnorm
