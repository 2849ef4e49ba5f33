// Copyright (c) the torchrl_vecnorm authors.
//
// This source code is licensed under the MIT license found in the
// LICENSE file in the root directory of this source tree.

// Rewards over the deviation of discounted returns, on a GPU.

#pragma once

#include "../returns.h"
#include "kernels.h"

namespace vecnorm {
namespace cuda {

// What a call needs beside the state: nothing where one block does it all.
WorkspaceSize returns_workspace(const Returns& of);

// The returns go on by a step, their moments are folded into the state, and rewards are
// divided by the scale.
cudaError_t scale_returns(const Returns& of, Discount by, Weights weights,
                          const Rule& rule, Workspace workspace, Stream stream);

}  // namespace cuda
}  // namespace vecnorm
