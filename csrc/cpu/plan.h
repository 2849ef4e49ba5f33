// Copyright (c) the torchrl_vecnorm authors.
//
// This source code is licensed under the MIT license found in the
// LICENSE file in the root directory of this source tree.

// How a key is cut into pieces of work for the CPU.
//
// The cut is a function of the shape, and never of the number of threads. Sums are then
// added in the same order on every run, and results are the same to the bit.

#pragma once

#include <algorithm>
#include <cstdint>

namespace vecnorm {

// A chunk is worth at least this many values: below it, starting a task and merging
// its partial sums cost more than they save.
constexpr int64_t kMinChunkElements = 8192;
// What a chunk costs for each feature, whatever its rows, should be spread over as
// many, if that leaves some chunks.
constexpr int64_t kMinChunkRows = 128;
constexpr int64_t kSomeChunks = 8;
// Enough pieces to feed many cores and to balance a small key beside a large one,
// few enough for the merge (features × chunks) to stay negligible.
constexpr int64_t kMaxPieces = 128;
// A wider key is cut along its features as well.
constexpr int64_t kMaxFeaturesPerBlock = 4096;

struct Plan {
  int64_t samples = 0;
  int64_t features = 0;
  int64_t rows_per_chunk = 0;
  int64_t row_chunks = 0;
  int64_t features_per_block = 0;
  int64_t feature_blocks = 0;

  int64_t pieces() const { return row_chunks * feature_blocks; }
};

struct Range {
  int64_t begin;
  int64_t end;
  int64_t size() const { return end - begin; }
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline Plan make_plan(int64_t samples, int64_t features) {
  Plan plan;
  plan.samples = samples;
  plan.features = features;
  if (features > 0) {
    plan.feature_blocks = ceil_div(features, kMaxFeaturesPerBlock);
    plan.features_per_block = ceil_div(features, plan.feature_blocks);
  }
  if (samples > 0 && features > 0) {
    plan.rows_per_chunk =
        std::max({ceil_div(kMinChunkElements, plan.features_per_block),
                  ceil_div(samples * plan.feature_blocks, kMaxPieces),
                  std::min(kMinChunkRows, ceil_div(samples, kSomeChunks))});
    plan.row_chunks = ceil_div(samples, plan.rows_per_chunk);
  }
  return plan;
}

inline Range rows_of(const Plan& plan, int64_t chunk) {
  return {chunk * plan.rows_per_chunk,
          std::min((chunk + 1) * plan.rows_per_chunk, plan.samples)};
}

inline Range features_of(const Plan& plan, int64_t block) {
  return {block * plan.features_per_block,
          std::min((block + 1) * plan.features_per_block, plan.features)};
}

}  // namespace vecnorm
