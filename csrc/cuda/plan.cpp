// Copyright (c) the torchrl_vecnorm authors.
//
// This source code is licensed under the MIT license found in the
// LICENSE file in the root directory of this source tree.

#include "plan.h"

#include <algorithm>
#include <numeric>

namespace vecnorm {
namespace cuda {
namespace {

// A row of a slab is read in one segment of so many bytes. Where every block of a slab
// reads what the others found, narrow slabs have fewer blocks, and fewer sums each.
constexpr int kWideSlab = 256;
constexpr int kSlab = 128;
constexpr int kNarrowSlab = 64;
// More blocks of one slab than this take longer to tell each other what they found
// than narrower segments take to read.
constexpr int kMaxGroup = 33;
// Short rows are grouped until they are this many threads wide, or until they fill
// whole vectors.
constexpr int kGroupColumns = std::min(64, std::min(kBlockThreads, kFusedThreads));
constexpr int kMaxColumns = std::min(256, std::min(kBlockThreads, kFusedThreads));
constexpr int kMaxGroupedFeatures = 256;

// Beyond this a block's share takes longer to read than all blocks take to meet.
constexpr int64_t kClusterBytes = 64 * 1024;
// The resident kernel has to keep this share of x to be worth its few threads.
constexpr double kKeptShare = 0.2;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t power_of_two_from(int64_t n) {
  int64_t p = 1;
  while (p < n) {
    p *= 2;
  }
  return p;
}

int size_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat32:
      return 4;
    case Dtype::kFloat64:
      return 8;
    case Dtype::kFloat16:
    case Dtype::kBFloat16:
      return 2;
    default:
      return 16;  // no vector loads for integers
  }
}

// Whether rows follow each other without a gap, from a multiple of 16 bytes on.
bool dense(const Matrix& m, int64_t features) {
  return m.feature_stride == 1 && m.row_stride == features &&
         reinterpret_cast<uintptr_t>(m.data) % 16 == 0;
}

// Whether every row starts at a multiple of 16 bytes.
bool aligned(const Matrix& m) {
  return m.feature_stride == 1 && reinterpret_cast<uintptr_t>(m.data) % 16 == 0 &&
         m.row_stride * size_of(m.dtype) % 16 == 0;
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
  const bool same = !use.maps || key.x.dtype == key.y.dtype;
  // A mask has a value a row: rows that have one are not grouped.
  const bool packed = dense(key.x, features) && (!use.maps || dense(key.y, features)) &&
                      (!use.sums || key.mask == nullptr);
  const bool wide = packed || (aligned(key.x) && (!use.maps || aligned(key.y)));
  int64_t vector = wide && same ? 16 / size_of(key.x.dtype) : 1;
  int64_t slab_lanes = vector > 1 ? slab_bytes / size_of(key.x.dtype) : kWarp;

  int64_t group = 1;
  if (vector > 1 && packed && (features < slab_lanes || features % vector != 0)) {
    const int64_t least = vector / std::gcd(vector, features);
    const int64_t columns = features * least / vector;
    if (columns <= kMaxColumns && features <= kMaxGroupedFeatures && least <= samples) {
      const int64_t room = std::max<int64_t>(kGroupColumns, columns);
      group = least * std::min(room / columns, samples / least);
    }
  }
  if (features * group % vector != 0) {
    vector = 1;
    slab_lanes = kWarp;
  }
  LanePlan plan;
  plan.vector = static_cast<int32_t>(vector);
  plan.group = static_cast<int32_t>(group);
  plan.lanes = static_cast<int32_t>(features * group);
  plan.rows = samples / group;
  const int64_t width =
      group > 1 ? plan.lanes : std::min<int64_t>(features, slab_lanes);
  plan.columns = static_cast<int32_t>(power_of_two_from(ceil_div(width, vector)));
  plan.slab_lanes =
      group > 1 ? plan.lanes : static_cast<int32_t>(plan.columns * vector);
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
  return threads / plan.columns;
}

LanePlan plan_two_kernels(const Key& key, Use use) {
  LanePlan plan = plan_lanes(key, use, kWideSlab);
  // At least two rows a thread, and few enough chunks for one block to combine them.
  cut_rows(&plan, std::max(1, 512 / plan.slabs), 2 * rows_at_once(plan, kBlockThreads));
  return plan;
}

int held(const Key& key) { return size_of(key.x.dtype) == 2 ? kHeldHalf : kHeld; }

// The vectors that fit into the shared memory of a fused kernel's block, a thread.
int slots_of(const Plan& plan, int size, const Limits& limits) {
  SharedSize shared;
  for (int i = 0; i < size; ++i) {
    shared.fit(plan.keys[i], kFusedThreads);
  }
  if (shared.bytes() > limits.shared) {
    return -1;
  }
  return static_cast<int>((limits.shared - shared.bytes()) / (16 * kFusedThreads));
}

// Clusters of blocks, one for each slab: false where they cannot hold all of x.
bool plan_cluster(const Key* keys, int size, const Limits& limits, Plan* plan) {
  plan->path = Path::kCluster;
  plan->cluster = 1;
  for (int i = 0; i < size; ++i) {
    plan->keys[i] = plan_lanes(keys[i], kBoth, kNarrowSlab);
    const LanePlan& k = plan->keys[i];
    const int64_t wanted = ceil_div(k.rows, rows_at_once(k, kFusedThreads));
    plan->cluster = static_cast<int>(
        std::clamp<int64_t>(power_of_two_from(wanted), plan->cluster, kMaxCluster));
  }
  for (int i = 0; i < size; ++i) {
    LanePlan& k = plan->keys[i];
    // Every slab has a whole cluster, some blocks of it without a row.
    k.rows_per_chunk = ceil_div(k.rows, plan->cluster);
    k.chunks = plan->cluster;
  }
  const int slots = slots_of(*plan, size, limits);
  if (limits.clusters == 0 || slots < 0) {
    return false;
  }
  for (int i = 0; i < size; ++i) {
    const LanePlan& k = plan->keys[i];
    if (k.vector == 1) {
      continue;  // read twice, kept nowhere
    }
    const int64_t more =
        ceil_div(k.rows_per_chunk, rows_at_once(k, kFusedThreads)) - held(keys[i]);
    if (more > slots) {
      return false;
    }
    plan->slots = std::max(plan->slots, static_cast<int>(more));
  }
  return true;
}

// Whether clusters are likely to be quicker than a grid whose blocks all wait.
bool suits_clusters(const Key* keys, int size, const Limits& limits, const Plan& plan) {
  int blocks = 0;
  int64_t most = 0;
  for (int i = 0; i < size; ++i) {
    const LanePlan& k = plan.keys[i];
    blocks += k.blocks();
    const int64_t width = k.group > 1 ? k.lanes : k.slab_lanes;
    most = std::max(most, k.rows_per_chunk * width * size_of(keys[i].x.dtype));
  }
  return blocks <= limits.clusters * kMaxCluster && most <= kClusterBytes;
}

int64_t bytes_of(const Key& key) {
  return key.samples * key.features * size_of(key.x.dtype);
}

// All blocks of the GPU, in proportion to the size of the keys: false where there are
// more slabs than blocks.
bool plan_resident(const Key* keys, int size, const Limits& limits, Plan* plan) {
  plan->path = Path::kResident;
  int64_t total = 0;
  for (int i = 0; i < size; ++i) {
    total += bytes_of(keys[i]);
  }
  int64_t blocks = 0;
  int64_t groups[kMaxKeys];
  for (int i = 0; i < size; ++i) {
    const double share = static_cast<double>(limits.processors) *
                         static_cast<double>(bytes_of(keys[i])) /
                         static_cast<double>(total);
    LanePlan& k = plan->keys[i];
    k = plan_lanes(keys[i], kBoth, kSlab);
    if (share > kMaxGroup * k.slabs) {
      k = plan_lanes(keys[i], kBoth, kNarrowSlab);
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
  for (int i = 0; i < size; ++i) {
    cut_rows(&plan->keys[i], groups[i], 1);
  }
  plan->slots = slots_of(*plan, size, limits);
  return limits.cooperative && plan->slots >= 0;
}

// Whether enough of x stays on the chip for the second pass to be quicker by it.
bool suits_residence(const Key* keys, int size, const Plan& plan) {
  double kept = 0;
  double total = 0;
  for (int i = 0; i < size; ++i) {
    const LanePlan& k = plan.keys[i];
    const double bytes = static_cast<double>(bytes_of(keys[i]));
    const double room =
        k.vector == 1 ? 0
                      : 16. * kFusedThreads * (held(keys[i]) + plan.slots) * k.blocks();
    kept += std::min(bytes, room);
    total += bytes;
  }
  return kept >= kKeptShare * total;
}

}  // namespace

LanePlan plan_sums(const Key& key) { return plan_two_kernels(key, {true, false}); }

LanePlan plan_maps(const Key& key) { return plan_two_kernels(key, {false, true}); }

Plan plan_update(const Key* keys, int size, const Limits& limits, Path wish) {
  const bool any = wish == Path::kAuto;
  const bool writes =
      std::all_of(keys, keys + size, [](const Key& k) { return k.y.data != nullptr; });
  Plan plan;
  if (writes && (any || wish == Path::kCluster) &&
      plan_cluster(keys, size, limits, &plan) &&
      (!any || suits_clusters(keys, size, limits, plan))) {
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
    plan.keys[i] = plan_sums(keys[i]);
  }
  return plan;
}

void SharedSize::fit(const LanePlan& plan, int threads) {
  features = std::max(features, plan.features);
  const int lanes = std::min(plan.slab_lanes, plan.lanes);
  const int rows = threads / std::max(plan.columns, kWarp);
  scratch = std::max({scratch, 2 * rows * lanes, threads});
}

size_t SharedSize::bytes() const {
  // flag, shift, old, mine, total, maps (see Shared in block.cuh)
  const size_t doubles =
      1 + 14 * static_cast<size_t>(features) + 3 + static_cast<size_t>(scratch);
  return (doubles * sizeof(double) + 15) / 16 * 16;
}

}  // namespace cuda
}  // namespace vecnorm
