// Copyright (c) the torchrl_vecnorm authors.
//
// This source code is licensed under the MIT license found in the
// LICENSE file in the root directory of this source tree.

// Which kernels run a call, and how its keys are cut into blocks. Plain host code.
//
// The cut is a function of the keys and of the GPU: sums are added in the same order on
// every run, and results are the same to the bit. Only where the GPU refuses a launch,
// because other processes hold a part of it, is it cut for two kernels from then on.

#pragma once

#include <cstddef>
#include <cstdint>

#include "../key.h"

#ifndef VECNORM_BLOCK_THREADS
#define VECNORM_BLOCK_THREADS 256
#endif
#ifndef VECNORM_FUSED_THREADS
#define VECNORM_FUSED_THREADS 512
#endif

namespace vecnorm {
namespace cuda {

// Keys of one launch: their parameters must fit into the 4 KB of a kernel's arguments.
constexpr int kMaxKeys = 16;
// Threads of a block, where update takes two launches and where it takes one.
constexpr int kBlockThreads = VECNORM_BLOCK_THREADS;
constexpr int kFusedThreads = VECNORM_FUSED_THREADS;
constexpr int kWarp = 32;
// Portable: where blocks can form clusters at all, 8 can.
constexpr int kMaxCluster = 8;
// Vectors that a thread of a fused kernel keeps in registers: of more, some would
// spill.
VECNORM_HD constexpr int held_of(Dtype type) {
  return type == Dtype::kFloat16 || type == Dtype::kBFloat16 ? 3 : 8;
}
// Bytes of the vectors of images: four values.
constexpr int kSmallVector = 4;
// Blocks that one processor runs at once, where update takes two launches: of the first
// one, and of the second one.
constexpr int kSumBlocks = 2;
constexpr int kMapBlocks = 3;

VECNORM_HD constexpr int log2_of(int power_of_two) {
  int shift = 0;
  while (1 << shift < power_of_two) {
    ++shift;
  }
  return shift;
}

// What the current GPU offers.
struct Limits {
  int processors;                      // blocks with all of `shared` that run at once
  size_t shared;                       // bytes that a block may have
  int clusters[log2_of(kMaxCluster)];  // of 2, 4, … such blocks, that run at once
  bool cooperative;                    // blocks that may wait for each other
};

enum class Path {
  kAuto,
  kCluster,     // one launch: clusters of up to 8 blocks keep x in shared memory
  kResident,    // one launch: all blocks are there at once, and keep what they can of x
  kTwoKernels,  // statistics, then normalise: any size, any GPU
};

// A key as rows of lanes. A lane is a feature; where rows are short or odd, `group` of
// them are taken as one row of group * features lanes, so that every thread can load
// whole 16-byte vectors. The last samples that fill no such row are the tail. Blocks
// share a key by slabs of neighbouring lanes and by chunks of rows. Vectors are 16
// bytes, or kSmallVector bytes of uint8 that come out as 16 bytes of float32.
struct LanePlan {
  int16_t group = 1;
  int8_t columns_shift = 0;  // log2 of columns()
  int8_t vector = 1;         // lanes that a thread loads at once; 1: any strides
  int32_t lanes = 0;
  int32_t slab_lanes = 0;
  int32_t slabs = 0;
  int32_t features = 0;  // of a slab; the last one may have fewer
  int32_t chunks = 0;
  int64_t rows = 0;
  int64_t rows_per_chunk = 0;

  // Threads that share a row.
  VECNORM_HD int columns() const { return 1 << columns_shift; }
  VECNORM_HD int blocks() const { return slabs * chunks; }
  // What a block tells the others of its slab: n, d1, d2 a feature, and its samples.
  VECNORM_HD int values() const { return 3 * features + 1; }
};

struct Plan {
  Path path = Path::kTwoKernels;
  int cluster = 1;        // blocks of a cluster
  int slots = 0;          // vectors that a thread keeps in shared memory
  int vector_bytes = 16;  // of such a vector
  LanePlan keys[kMaxKeys];
};

// The cut for a kernel that reads x, writes y, or both.
LanePlan plan_sums(const Key& key, const Limits& limits);
LanePlan plan_maps(const Key& key, const Limits& limits);

// Kernels are compiled for one type of vectors each; that of float32 takes keys without
// any along, of every type.
constexpr Dtype kNoVectors = Dtype::kBool;
Dtype kernel_type(const Key& key);

// The kernels for up to kMaxKeys keys, none of them empty. Any other wish than kAuto is
// granted if these keys can be had that way; else it is kTwoKernels, which leaves the
// plan of the maps to plan_maps.
Plan plan_update(const Key* keys, int size, const Limits& limits, Path wish);

// Doubles of shared memory that the plan's blocks need beside the values they keep:
// for sums of `scratch` doubles at a time, and for slabs of at most `features`.
struct SharedSize {
  int features = 0;
  int scratch = 0;

  void fit(const LanePlan& plan, int threads);
  size_t bytes() const;
};

}  // namespace cuda
}  // namespace vecnorm
