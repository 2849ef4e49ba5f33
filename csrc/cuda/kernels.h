// Copyright (c) the torchrl_vecnorm authors.
//
// This source code is licensed under the MIT license found in the
// LICENSE file in the root directory of this source tree.

// The CUDA backend: each function launches kernels for all keys of a call on a stream,
// reads nothing back and allocates nothing.

#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "../key.h"
#include "../moments.h"
#include "device.h"

namespace vecnorm {
namespace cuda {

// What update() needs beside the state. `counters` are zero before the first call, and
// zero again after each.
struct Workspace {
  double* partials;
  unsigned* counters;
};

struct WorkspaceSize {
  size_t partials;  // doubles
  size_t counters;
};

WorkspaceSize workspace_size(const std::vector<Key>& keys);

// Folds each key's batch into its state and writes y with the new statistics.
cudaError_t update(const std::vector<Key>& keys, Weights weights, double eps,
                   Workspace workspace, Stream stream);

// y = (x - loc) / scale with the statistics as they are.
cudaError_t normalize(const std::vector<Key>& keys, double eps, Stream stream);

// The inverse: y = x * scale + loc.
cudaError_t denormalize(const std::vector<Key>& keys, double eps, Stream stream);

}  // namespace cuda
}  // namespace vecnorm
