// Copyright (c) the torchrl_vecnorm authors.
//
// This source code is licensed under the MIT license found in the
// LICENSE file in the root directory of this source tree.

// How a key is cut into pieces of work: plain data that every backend reads.
//
// The cut is a function of the shape, on CUDA also of what allows for 16-byte loads,
// and never of the number of threads. Sums are then added in the same order on every
// run, and results are the same to the bit.

#pragma once

#include <algorithm>
#include <cstdint>

namespace vecnorm {

// A chunk is worth at least this many values: below it, starting a task and merging
// its partial sums cost more than they save.
constexpr int64_t kMinChunkElements = 8192;
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
    plan.rows_per_chunk = std::max(ceil_div(kMinChunkElements, plan.features_per_block),
                                   ceil_div(samples * plan.feature_blocks, kMaxPieces));
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

// ------------------------------------------------------------------ lanes (CUDA)

// A thread block reads a slab of at most this many neighbouring lanes: 128 bytes of
// half, 256 of float.
constexpr int kSlabLanes = 64;
#ifndef VECNORM_BLOCK_THREADS
#define VECNORM_BLOCK_THREADS 256
#endif
constexpr int kBlockThreads = VECNORM_BLOCK_THREADS;
// Rows are grouped into lanes up to this width.
constexpr int64_t kMaxGroupedLanes = 1024;

// A key as rows of lanes. A lane is a feature; where rows are short or odd, `group` of
// them are taken as one row of group * features lanes, so that every thread can load
// whole 16-byte vectors. The last samples that fill no such row are the tail.
struct LanePlan {
  int32_t vector = 1;  // lanes that a thread loads at once; 1: any strides
  int32_t group = 1;
  int32_t lanes = 0;
  int32_t slabs = 0;
  int32_t columns = 1;  // threads that share a row
  int32_t chunks = 0;
  int64_t rows = 0;
  int64_t rows_per_chunk = 0;
};

inline int64_t power_of_two_from(int64_t n) {
  int64_t p = 1;
  while (p < n) {
    p *= 2;
  }
  return p;
}

// `vector` is what a 16-byte load holds if rows start at multiples of 16 bytes and
// features are neighbours, else 1; `dense` if rows follow each other without a gap.
inline LanePlan make_lane_plan(int64_t samples, int64_t features, int vector,
                               bool dense) {
  LanePlan plan;
  if (samples == 0 || features == 0) {
    return plan;
  }
  int64_t group = 1;
  if (vector > 1 && (dense ? features < kSlabLanes || features % vector != 0 : false)) {
    while (features * group % vector != 0) {
      ++group;
    }
    group *= std::max<int64_t>(1, kSlabLanes / (features * group));
  }
  if (features * group % vector != 0 || group > samples ||
      (group > 1 && features * group > kMaxGroupedLanes)) {
    vector = 1;
    group = 1;
  }
  plan.vector = vector;
  plan.group = static_cast<int32_t>(group);
  plan.lanes = static_cast<int32_t>(features * group);
  plan.rows = samples / group;
  plan.slabs = static_cast<int32_t>(ceil_div(plan.lanes, kSlabLanes));
  const int64_t width = std::min<int64_t>(plan.lanes, kSlabLanes);
  plan.columns = static_cast<int32_t>(power_of_two_from(ceil_div(width, vector)));
  // At least two rows a thread, and few enough chunks for one block to combine them.
  const int64_t least = 2 * kBlockThreads / plan.columns;
  const int64_t most_chunks = std::max<int64_t>(1, 512 / plan.slabs);
  plan.rows_per_chunk = std::max(least, ceil_div(plan.rows, most_chunks));
  plan.chunks = static_cast<int32_t>(ceil_div(plan.rows, plan.rows_per_chunk));
  return plan;
}

}  // namespace vecnorm
