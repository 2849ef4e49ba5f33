// Copyright (c) the torchrl_vecnorm authors.
//
// This source code is licensed under the MIT license found in the
// LICENSE file in the root directory of this source tree.

#include "plan.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace vecnorm {
namespace cuda {
namespace {

// A row of a slab is read in one segment of so many bytes. Where every block of a slab
// reads what the others found, narrow slabs have fewer blocks, and fewer sums each.
constexpr int kWideSlab = 256;
constexpr int kSlab = 128;
constexpr int kNarrowSlab = 64;
// Where there are more narrow slabs than blocks that run at once, they are wider.
constexpr int kWidestSlab = 4096;
// More blocks of one slab than this take longer to tell each other what they found
// than narrower segments take to read.
constexpr int kMaxGroup = 33;
// Short rows are grouped until they are this many threads wide, or until they fill
// whole vectors.
constexpr int kGroupColumns = std::min(64, std::min(kBlockThreads, kFusedThreads));
constexpr int kMaxColumns = std::min(256, std::min(kBlockThreads, kFusedThreads));
constexpr int kMaxGroupedFeatures = 256;

// The bytes below come from a model (bench/model.py), not from a measurement.
//
// Beyond this a block's share takes longer to read than all blocks take to meet.
constexpr int64_t kClusterBytes = 64 * 1024;
// Below this it takes longer to meet one more block than to read and write its share.
constexpr int64_t kResidentBytes = 16 * 1024;
// The same where all blocks meet, as rows are grouped, and each reads the sums of all:
// beyond so many blocks.
constexpr int64_t kGroupedBytes = 96 * 1024;
constexpr int64_t kGroupedBlocks = 16;
// The resident kernel has to keep this share of x to be worth its few threads.
constexpr double kKeptShare = 0.1;
// What any GPU's L2 cache has room for.
constexpr double kCachedBytes = 2e6;
// Images below this go along with keys of other types; others have kernels of their
// own.
constexpr int64_t kImageBytes = 16 * 1024;
// Waves of blocks, where there are more slabs than blocks that run at once.
constexpr int kWaves = 4;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t power_of_two_from(int64_t n) {
  int64_t p = 1;
  while (p < n) {
    p *= 2;
  }
  return p;
}

int64_t bytes_of(const Key& key) {
  return key.samples * key.features * value_size(key.x.dtype);
}

int vector_bytes(Dtype type) { return type == Dtype::kUInt8 ? kSmallVector : 16; }

// Whether rows follow each other without a gap, from a whole vector on.
bool dense(const Matrix& m, int64_t features, int vector) {
  return m.feature_stride == 1 && m.row_stride == features &&
         reinterpret_cast<uintptr_t>(m.data) % (vector * value_size(m.dtype)) == 0;
}

// Whether every row starts at a whole vector.
bool aligned(const Matrix& m, int vector) {
  return m.feature_stride == 1 && m.row_stride % vector == 0 &&
         reinterpret_cast<uintptr_t>(m.data) % (vector * value_size(m.dtype)) == 0;
}

// Whether so many samples can be had as rows of `least` samples each.
bool can_group(int64_t samples, int64_t features, int64_t least, int vector) {
  return features * least / vector <= kMaxColumns && features <= kMaxGroupedFeatures &&
         least <= samples;
}

// Samples that fill whole vectors.
int64_t least_group(int64_t features, int vector) {
  return vector / std::gcd(static_cast<int64_t>(vector), features);
}

// The type that the vectors of a key could have.
Dtype type_of_vectors(const Key& key) {
  const bool writes = key.y.data != nullptr;
  switch (key.x.dtype) {
    case Dtype::kFloat32:
    case Dtype::kFloat64:
    case Dtype::kFloat16:
    case Dtype::kBFloat16:
      return !writes || key.y.dtype == key.x.dtype ? key.x.dtype : kNoVectors;
    case Dtype::kUInt8:
      return (!writes || key.y.dtype == Dtype::kFloat32) && bytes_of(key) >= kImageBytes
                 ? Dtype::kUInt8
                 : kNoVectors;
    default:
      return kNoVectors;
  }
}

// Whether all of a key can be read, and written, in vectors. A mask has a value a row:
// rows that have one are not grouped where they are summed.
bool has_vectors(const Key& key, int vector) {
  const bool writes = key.y.data != nullptr;
  const bool packed = dense(key.x, key.features, vector) &&
                      (!writes || dense(key.y, key.features, vector));
  if (key.features % vector == 0) {
    return packed || (aligned(key.x, vector) && (!writes || aligned(key.y, vector)));
  }
  return packed && key.mask == nullptr &&
         can_group(key.samples, key.features, least_group(key.features, vector),
                   vector);
}

// What a kernel does with a key.
struct Use {
  bool sums;
  bool maps;
};
constexpr Use kBoth = {true, true};

// How the lanes of a key are cut; its rows are not yet.
LanePlan plan_lanes(const Key& key, Use use, int slab_bytes) {
  const int64_t samples = key.samples;
  const int64_t features = key.features;
  const Dtype type = kernel_type(key);
  const int vector = type == kNoVectors ? 1 : vector_bytes(type) / value_size(type);
  const bool packed = dense(key.x, features, vector) &&
                      (!use.maps || dense(key.y, features, vector)) &&
                      (!use.sums || key.mask == nullptr);
  const int64_t slab_lanes =
      vector > 1 ? std::min(slab_bytes / value_size(type), kMaxColumns * vector)
                 : std::clamp(slab_bytes / 4, kWarp, kMaxColumns);
  int64_t group = 1;
  if (vector > 1 && packed && (features < slab_lanes || features % vector != 0)) {
    const int64_t least = least_group(features, vector);
    if (can_group(samples, features, least, vector)) {
      const int64_t columns = features * least / vector;
      const int64_t room = std::max<int64_t>(kGroupColumns, columns);
      group = least * std::min(room / columns, samples / least);
    }
  }
  LanePlan plan;
  plan.vector = static_cast<int8_t>(vector);
  plan.group = static_cast<int16_t>(group);
  plan.lanes = static_cast<int32_t>(features * group);
  plan.rows = samples / group;
  const int64_t width =
      group > 1 ? plan.lanes : std::min<int64_t>(features, slab_lanes);
  plan.columns_shift = static_cast<int8_t>(
      log2_of(static_cast<int>(power_of_two_from(ceil_div(width, vector)))));
  plan.slab_lanes = group > 1 ? plan.lanes : plan.columns() * vector;
  plan.slabs = static_cast<int32_t>(ceil_div(plan.lanes, plan.slab_lanes));
  plan.features = group > 1 ? static_cast<int32_t>(features)
                            : std::min(plan.slab_lanes, plan.lanes);
  return plan;
}

void cut_rows(LanePlan* plan, int64_t chunks, int64_t least) {
  plan->rows_per_chunk = std::max(least, ceil_div(plan->rows, chunks));
  plan->chunks = static_cast<int32_t>(ceil_div(plan->rows, plan->rows_per_chunk));
}

int64_t rows_at_once(const LanePlan& plan, int threads) {
  return threads >> plan.columns_shift;
}

LanePlan plan_two_kernels(const Key& key, Use use, const Limits& limits) {
  LanePlan plan = plan_lanes(key, use, kWideSlab);
  // All blocks at once, or so many waves of them that the last one does not matter.
  const int at_once = limits.processors * (use.maps ? kMapBlocks : kSumBlocks);
  const int64_t chunks = plan.slabs <= at_once ? at_once / plan.slabs
                                               : ceil_div(kWaves * at_once, plan.slabs);
  // A few rows a thread, so that one block does not have to add up too much.
  const int least = use.maps ? 2 : 4;
  cut_rows(&plan, chunks, least * rows_at_once(plan, kBlockThreads));
  return plan;
}

// The vectors that fit into the shared memory of a fused kernel's block, a thread.
int slots_of(const Plan& plan, int size, const Limits& limits) {
  SharedSize shared;
  for (int i = 0; i < size; ++i) {
    shared.fit(plan.keys[i], kFusedThreads);
  }
  if (shared.bytes() > limits.shared) {
    return -1;
  }
  return static_cast<int>((limits.shared - shared.bytes()) /
                          (plan.vector_bytes * kFusedThreads));
}

// Vectors of a thread beyond those that it keeps in registers.
int64_t overflow(const Key& key, const LanePlan& plan) {
  const int64_t all = ceil_div(plan.rows_per_chunk, rows_at_once(plan, kFusedThreads));
  return plan.vector == 1 ? 0 : std::max<int64_t>(all - held_of(kernel_type(key)), 0);
}

// Clusters of up to `most` blocks, one for each slab: false where they cannot hold all
// of x.
bool plan_cluster(const Key* keys, int size, const Limits& limits, int slab_bytes,
                  int most, Plan* plan) {
  plan->path = Path::kCluster;
  plan->cluster = 1;
  plan->vector_bytes = vector_bytes(kernel_type(keys[0]));
  for (int i = 0; i < size; ++i) {
    plan->keys[i] = plan_lanes(keys[i], kBoth, slab_bytes);
    const LanePlan& k = plan->keys[i];
    const int64_t wanted = ceil_div(k.rows, rows_at_once(k, kFusedThreads));
    plan->cluster = static_cast<int>(
        std::clamp<int64_t>(power_of_two_from(wanted), plan->cluster, most));
  }
  for (int i = 0; i < size; ++i) {
    LanePlan& k = plan->keys[i];
    // Every slab has a whole cluster, some blocks of it without a row.
    k.rows_per_chunk = ceil_div(k.rows, plan->cluster);
    k.chunks = plan->cluster;
  }
  const int slots = slots_of(*plan, size, limits);
  if (limits.clusters[log2_of(kMaxCluster) - 1] == 0 || slots < 0) {
    return false;
  }
  for (int i = 0; i < size; ++i) {
    // Without vectors, values are read twice and kept nowhere.
    const int64_t more = overflow(keys[i], plan->keys[i]);
    if (more > slots) {
      return false;
    }
    plan->slots = std::max(plan->slots, static_cast<int>(more));
  }
  return true;
}

// Whether clusters are likely to be quicker than a grid whose blocks all wait.
bool suits_clusters(const Key* keys, int size, const Limits& limits, const Plan& plan) {
  int64_t blocks = 0;
  int64_t most = 0;
  for (int i = 0; i < size; ++i) {
    const LanePlan& k = plan.keys[i];
    blocks += static_cast<int64_t>(k.slabs) * k.chunks;
    const int64_t width = k.group > 1 ? k.lanes : k.slab_lanes;
    most = std::max(most, k.rows_per_chunk * width * value_size(keys[i].x.dtype));
  }
  const int at_once = plan.cluster == 1
                          ? limits.processors
                          : limits.clusters[log2_of(plan.cluster) - 1] * plan.cluster;
  return blocks <= at_once && most <= kClusterBytes;
}

// Narrow slabs if their clusters all run at once, be it with fewer blocks; else wider
// ones. Blocks that need no other do not have to be there at once.
bool find_clusters(const Key* keys, int size, const Limits& limits, Plan* plan) {
  for (int slab = kNarrowSlab; slab <= kWidestSlab; slab *= 2) {
    for (int most = kMaxCluster; most > 0; most /= 2) {
      *plan = Plan();
      if (plan_cluster(keys, size, limits, slab, most, plan) &&
          suits_clusters(keys, size, limits, *plan)) {
        return true;
      }
      most = std::min(most, plan->cluster);
    }
  }
  return false;
}

// How many blocks a key is worth where they all wait for each other.
int64_t worth(const Key& key, const LanePlan& plan) {
  const int64_t bytes = key.samples * key.features *
                        (value_size(key.x.dtype) + value_size(key.y.dtype)) / 2;
  const int64_t blocks = ceil_div(bytes, kResidentBytes);
  return plan.group > 1 ? std::max(std::min(blocks, kGroupedBlocks),
                                   ceil_div(bytes, kGroupedBytes))
                        : blocks;
}

// All blocks of the GPU, in proportion to the size of the keys, but none for too
// little: false where there are more slabs than blocks.
bool plan_resident(const Key* keys, int size, const Limits& limits, Plan* plan) {
  plan->path = Path::kResident;
  plan->vector_bytes = vector_bytes(kernel_type(keys[0]));
  int64_t total = 0;
  for (int i = 0; i < size; ++i) {
    total += bytes_of(keys[i]);
  }
  int64_t blocks = 0;
  int64_t groups[kMaxKeys];
  for (int i = 0; i < size; ++i) {
    const double bytes = static_cast<double>(bytes_of(keys[i]));
    const double fair = limits.processors * bytes / static_cast<double>(total);
    LanePlan& k = plan->keys[i];
    int slab = kSlab;
    k = plan_lanes(keys[i], kBoth, slab);
    const double share = std::min(fair, static_cast<double>(worth(keys[i], k)));
    if (share > kMaxGroup * k.slabs) {
      k = plan_lanes(keys[i], kBoth, kNarrowSlab);
    }
    while (k.slabs > std::max(fair, 1.) && slab < kWidestSlab) {
      slab *= 2;
      k = plan_lanes(keys[i], kBoth, slab);
    }
    const int64_t most = ceil_div(k.rows, 2 * rows_at_once(k, kFusedThreads));
    groups[i] = std::clamp<int64_t>(static_cast<int64_t>(share) / k.slabs, 1,
                                    std::max<int64_t>(most, 1));
    blocks += groups[i] * k.slabs;
  }
  while (blocks > limits.processors) {
    const int widest =
        static_cast<int>(std::max_element(groups, groups + size) - groups);
    if (groups[widest] == 1) {
      return false;
    }
    --groups[widest];
    blocks -= plan->keys[widest].slabs;
  }
  int64_t more = 0;
  for (int i = 0; i < size; ++i) {
    cut_rows(&plan->keys[i], groups[i], 1);
    more = std::max(more, overflow(keys[i], plan->keys[i]));
  }
  const int slots = slots_of(*plan, size, limits);
  plan->slots = static_cast<int>(std::min<int64_t>(slots, more));
  return limits.cooperative && slots >= 0;
}

// Whether enough of x stays on the chip, be it in the cache, for the second pass to be
// quicker by it.
bool suits_residence(const Key* keys, int size, const Plan& plan) {
  double kept = 0;
  double total = 0;
  for (int i = 0; i < size; ++i) {
    const LanePlan& k = plan.keys[i];
    const double bytes = static_cast<double>(bytes_of(keys[i]));
    const double room =
        k.vector == 1 ? 0
                      : static_cast<double>(plan.vector_bytes) * kFusedThreads *
                            (held_of(kernel_type(keys[i])) + plan.slots) * k.blocks();
    kept += std::min(bytes, room);
    total += bytes;
  }
  return kept >= kKeptShare * total || total <= kCachedBytes;
}

}  // namespace

Dtype kernel_type(const Key& key) {
  const Dtype type = type_of_vectors(key);
  const bool has =
      type != kNoVectors && has_vectors(key, vector_bytes(type) / value_size(type));
  return has ? type : kNoVectors;
}

LanePlan plan_sums(const Key& key, const Limits& limits) {
  return plan_two_kernels(key, {true, false}, limits);
}

LanePlan plan_maps(const Key& key, const Limits& limits) {
  return plan_two_kernels(key, {false, true}, limits);
}

Plan plan_update(const Key* keys, int size, const Limits& limits, Path wish) {
  const bool any = wish == Path::kAuto;
  const bool writes =
      std::all_of(keys, keys + size, [](const Key& k) { return k.y.data != nullptr; });
  Plan plan;
  if (writes && any && find_clusters(keys, size, limits, &plan)) {
    return plan;
  }
  plan = Plan();
  if (writes && wish == Path::kCluster &&
      plan_cluster(keys, size, limits, kNarrowSlab, kMaxCluster, &plan)) {
    return plan;
  }
  plan = Plan();
  if (writes && (any || wish == Path::kResident) &&
      plan_resident(keys, size, limits, &plan) &&
      (!any || suits_residence(keys, size, plan))) {
    return plan;
  }
  plan = Plan();
  for (int i = 0; i < size; ++i) {
    plan.keys[i] = plan_sums(keys[i], limits);
  }
  return plan;
}

void SharedSize::fit(const LanePlan& plan, int threads) {
  features = std::max(features, plan.features);
  const int lanes = std::min(plan.slab_lanes, plan.lanes);
  const int rows = threads / std::max(plan.columns(), kWarp);
  scratch = std::max({scratch, 2 * rows * lanes, threads});
}

size_t SharedSize::bytes() const {
  // flag, count, shift, old, mine, total, maps (see Shared in block.cuh)
  const size_t doubles =
      2 + 15 * static_cast<size_t>(features) + 3 + static_cast<size_t>(scratch);
  return (doubles * sizeof(double) + 15) / 16 * 16;
}

}  // namespace cuda
}  // namespace vecnorm
