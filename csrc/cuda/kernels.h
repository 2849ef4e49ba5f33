// Copyright (c) the torchrl_vecnorm authors.
//
// This source code is licensed under the MIT license found in the
// LICENSE file in the root directory of this source tree.

// The CUDA backend: each function launches kernels for all keys of a call on a stream,
// reads nothing back and allocates no device memory.

#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "../key.h"
#include "../moments.h"
#include "device.h"
#include "params.h"
#include "plan.h"

namespace vecnorm {
namespace cuda {

// What an update needs beside the state. `counters` are zero before the first call; a
// call leaves them fit for the next one, whatever its keys.
struct Workspace {
  double* partials;
  unsigned* counters;
};

struct WorkspaceSize {
  size_t partials = 0;  // doubles
  size_t counters = 0;
};

// Folds each key's batch into its state and writes y with the new statistics.
class Update {
 public:
  // Plans for the current device. `wish` is for tests and benchmarks.
  Update(const std::vector<Key>& keys, Weights weights, const Rule& rule,
         Path wish = Path::kAuto);
  Update(const Update&) = delete;  // the batches point into keys_
  Update& operator=(const Update&) = delete;

  WorkspaceSize workspace() const { return workspace_; }
  cudaError_t run(Workspace workspace, Stream stream);
  // How the first keys run, or ran.
  Path path() const { return batches_.empty() ? Path::kAuto : batches_[0].plan.path; }

 private:
  struct Batch {
    const Key* keys;
    int size;
    Plan plan;
  };

  cudaError_t run(const Batch& batch, Workspace* workspace, Stream stream) const;
  WorkspaceSize workspace_of(const Batch& batch) const;

  std::vector<Key> keys_;  // those with samples
  Weights weights_;
  Rule rule_;
  int device_ = 0;
  Limits limits_ = {};
  cudaError_t error_ = cudaSuccess;
  std::vector<Batch> batches_;
  WorkspaceSize workspace_;
};

// What the current device offers these kernels.
cudaError_t current_limits(Limits* limits);

// y = (x - loc) / scale with the statistics as they are.
cudaError_t normalize(const std::vector<Key>& keys, const Rule& rule, Stream stream);

// The inverse: y = x * scale + loc.
cudaError_t denormalize(const std::vector<Key>& keys, const Rule& rule, Stream stream);

}  // namespace cuda
}  // namespace vecnorm
