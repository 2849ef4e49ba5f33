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
constexpr int64_t kMinChunkElements = 16384;
// What a chunk costs for each feature, whatever its rows, should be spread over as
// many, if that leaves some chunks.
constexpr int64_t kMinChunkRows = 128;
constexpr int64_t kSomeChunks = 8;
// Enough pieces to feed many cores and to balance a small key beside a large one,
// few enough for the merge (features × chunks) to stay negligible.
constexpr int64_t kMaxPieces = 128;
// A wider key is cut along its features as well.
constexpr int64_t kMaxFeaturesPerBlock = 4096;
// Calls with fewer values than that stay on the calling thread: waking the others takes
// longer.
constexpr int64_t kSerialValues = 32768;
// What the statistics of a feature take, in values.
constexpr int64_t kFeatureValues = 16;
// Features of a strip: the part of the work on statistics, and of a key that is done
// strip by strip.
constexpr int64_t kStrip = 256;
// So many strips, of no more samples than stay in a core's cache, are enough work for
// the threads without a cut along the samples, and need no sums in memory.
constexpr int64_t kManyStrips = 8;
constexpr int64_t kMaxStripSamples = 512;
// A strip of so few samples is not worth a cut, however few there are.
constexpr int64_t kFewStripSamples = 128;

struct Plan {
  int64_t samples = 0;
  int64_t features = 0;
  int64_t rows_per_chunk = 0;
  int64_t row_chunks = 0;
  int64_t features_per_block = 0;
  int64_t feature_blocks = 0;
  bool by_strips = false;  // a strip is done from the state to the output in one go

  int64_t pieces() const { return by_strips ? 0 : row_chunks * feature_blocks; }
  int64_t strips() const;
};

struct Range {
  int64_t begin;
  int64_t end;
  int64_t size() const { return end - begin; }
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t Plan::strips() const { return ceil_div(features, kStrip); }

// `sums`: whether the values are summed, or only mapped.
inline Plan make_plan(int64_t samples, int64_t features, bool sums) {
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
    const int64_t strips = plan.strips();
    const bool small = (samples + kFeatureValues) * features < kSerialValues ||
                       (strips > 1 && samples <= kFewStripSamples);
    plan.by_strips = plan.row_chunks == 1 || (sums && small) ||
                     (strips >= kManyStrips && samples <= kMaxStripSamples);
    if (plan.by_strips) {
      plan.rows_per_chunk = samples;
      plan.row_chunks = 1;
    }
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
