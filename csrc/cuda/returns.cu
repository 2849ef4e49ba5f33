// Copyright (c) the torchrl_vecnorm authors.
//
// This source code is licensed under the MIT license found in the
// LICENSE file in the root directory of this source tree.

// Rewards over the deviation of discounted returns. The rewards of a step are few: what
// one block can do in the time that a launch takes, it does, from the returns to the
// scaled rewards. More are shared by blocks: each sums its rows, the last one to finish
// adds up the sums of all in order and folds them into the state, and normalize() is a
// second launch.
//
// Sums are in double from the start; values may be of any type and stride.

#include <algorithm>

#include "block.cuh"
#include "launches.h"
#include "returns.h"

namespace vecnorm {
namespace cuda {
namespace {

#include "../step_return.inl"

// Few enough that each has the registers for some rows at once.
constexpr int64_t kReturnThreads = kFusedThreads < 256 ? kFusedThreads : 256;
// Values of a block that is alone, and rows of one that is not, while these are few.
constexpr int64_t kAlone = 32 * kReturnThreads;
constexpr int64_t kReturnRows = 8 * kReturnThreads;
constexpr int64_t kMostBlocks = 256;
// What a block finds of a feature: a Partial, and how many rows count.
constexpr int kFound = 4;

struct ReturnsParams {
  Returns of;
  Discount by;
  Weights weights;
  Rule rule;
  int64_t rows_per_block;
  double* partials;  // [features][blocks][kFound]
  unsigned* counter;
};

struct RoundTo {
  const Leaf& leaf;
  __device__ double operator()(double x) const { return leaf.rounded(x); }
};

struct Found {
  Partial sums;
  double rows = 0;

  __device__ void add(const Found& other) {
    sums = combine(sums, other.sums);
    rows += other.rows;
  }
};

// What all threads of the block have found, for each of them. Also a barrier.
__device__ inline Found sum_over_block(const Found& mine) {
  double values[kFound] = {mine.sums.n, mine.sums.d1, mine.sums.d2, mine.rows};
  for (int step = kWarp / 2; step > 0; step /= 2) {
    for (double& value : values) {
      value += shuffle_xor(value, step);
    }
  }
  double* const scratch = reinterpret_cast<double*>(shared_memory());
  const int thread = static_cast<int>(threadIdx.x);
  __syncthreads();  // it may still be read
  if (thread % kWarp == 0) {
    for (int q = 0; q < kFound; ++q) {
      scratch[thread / kWarp * kFound + q] = values[q];
    }
  }
  __syncthreads();
  Found all;
  for (int w = 0; w < kReturnThreads / kWarp; ++w) {
    const double* const of = scratch + w * kFound;
    all.add({{of[0], of[1], of[2]}, of[3]});
  }
  return all;
}

// Values of a feature in rows that are a block's threads apart, from `row` on.
__device__ __forceinline__ void load_rows(Column* column, const Matrix& m, int64_t row,
                                          int64_t f, int n) {
  column->load_from(m, row * m.row_stride + f * m.feature_stride,
                    kReturnThreads * m.row_stride, n);
}

// How many of its rows a thread takes at once, from `row` on.
__device__ inline int rows_at_once(int64_t row, int64_t end) {
  const int64_t left = (end - row + kReturnThreads - 1) / kReturnThreads;
  return static_cast<int>(left < kValuesAtOnce ? left : kValuesAtOnce);
}

// The returns of the block's rows go on, and are summed by each thread. What some rows
// are made of is all under way before the first of it is used.
__device__ inline Found step_rows(const ReturnsParams& p, int64_t f, double shift) {
  const Key& key = p.of.key;
  const Leaf& kept = p.of.returns;
  const Matrix returns{kept.data, kept.dtype, key.features, 1};
  const int64_t begin = blockIdx.x * p.rows_per_block;
  const int64_t left = key.samples - begin;
  const int64_t end = begin + (left < p.rows_per_block ? left : p.rows_per_block);
  const bool* const done = p.of.done;
  const bool* const mask = key.mask;
  Found mine;
#pragma unroll 1
  for (int64_t row = begin + static_cast<int>(threadIdx.x); row < end;
       row += kValuesAtOnce * kReturnThreads) {
    const int n = rows_at_once(row, end);
    Column old_values;
    Column rewards;
    unsigned ends = 0;  // a bit a row
    unsigned counts = 0;
    load_rows(&old_values, returns, row, f, n);
    load_rows(&rewards, key.x, row, f, n);
#pragma unroll
    for (int j = 0; j < kValuesAtOnce; ++j) {
      const int64_t at = row + j * kReturnThreads;
      ends |= static_cast<unsigned>(j < n && done[at]) << j;
      counts |= static_cast<unsigned>(j < n && (mask == nullptr || mask[at])) << j;
    }
    double old[kValuesAtOnce];
    double reward[kValuesAtOnce];
    old_values.convert(kept.dtype, old);
    rewards.convert(key.x.dtype, reward);
#pragma unroll
    for (int j = 0; j < kValuesAtOnce; ++j) {
      if ((counts >> j & 1) != 0) {
        const bool is_end = (ends >> j & 1) != 0;
        const ReturnStep<double> step =
            step_return(old[j], reward[j], is_end, true, p.by, RoundTo{kept});
        kept.write((row + j * kReturnThreads) * key.features + f, step.left);
        mine.sums = reduce(mine.sums, step.seen, shift);
        mine.rows += 1;
      }
    }
  }
  return mine;
}

// One row after the other: the rewards are in the cache.
template <typename C>
__device__ void scale_rows(const ReturnsParams& p, int64_t f, const Statistic& s) {
  const Key& key = p.of.key;
  const auto map = Affine<C>::of(s);
  const C limit = p.rule.limit<C>();
#pragma unroll 1
  for (int64_t row = static_cast<int>(threadIdx.x); row < key.samples;
       row += kReturnThreads) {
    const C value = static_cast<C>(load_any(key.x, row, f));
    store_any(key.y, row, f, map(value, limit));
  }
}

// Has one thread fold a feature, and shows all what comes of it.
__device__ inline Statistic fold_returns(const ReturnsParams& p, int64_t f,
                                         const Found& all, double shift) {
  const Key& key = p.of.key;
  double* const shown =
      reinterpret_cast<double*>(shared_memory()) + kFound * (kReturnThreads / kWarp);
  if (threadIdx.x == 0) {
    const Moments folded =
        fold_sums(key.state, f, key.features, all.sums, shift, all.rows, p.weights);
    const Statistic s = statistic(folded, p.rule.scaling, key.state.rounding());
    shown[0] = s.loc;
    shown[1] = s.scale;
  }
  __syncthreads();
  return {shown[0], shown[1]};
}

__device__ inline double shift_of(const ReturnsParams& p, int64_t f) {
  return shift_of_returns(p.of.key, f, load_any(p.of.key.x, 0, f), p.weights);
}

__global__ void __launch_bounds__(kReturnThreads, 1)
    alone_kernel(const __grid_constant__ ReturnsParams p) {
  const Key& key = p.of.key;
  double rows = 0;
#pragma unroll 1
  for (int64_t f = 0; f < key.features; ++f) {
    const double shift = shift_of(p, f);
    const Found all = sum_over_block(step_rows(p, f, shift));
    const Statistic s = fold_returns(p, f, all, shift);
    rows = all.rows;
    if (key.y.data != nullptr) {
      maps_in_float(key) ? scale_rows<float>(p, f, s) : scale_rows<double>(p, f, s);
    }
  }
  // All have read the count: the last fold is behind a barrier.
  if (threadIdx.x == 0) {
    fold_count(key.state, rows, p.weights);
  }
}

__global__ void __launch_bounds__(kReturnThreads, 1)
    together_kernel(const __grid_constant__ ReturnsParams p) {
  const Key& key = p.of.key;
  const int blocks = static_cast<int>(gridDim.x);
  for (int64_t f = 0; f < key.features; ++f) {
    const Found mine = sum_over_block(step_rows(p, f, shift_of(p, f)));
    if (threadIdx.x == 0) {
      double* const to = p.partials + (f * blocks + blockIdx.x) * kFound;
      to[0] = mine.sums.n;
      to[1] = mine.sums.d1;
      to[2] = mine.sums.d2;
      to[3] = mine.rows;
    }
  }
  // The thread that has written says so, and one that reads hears it.
  const bool last =
      threadIdx.x == 0 && comes_last(p.counter, static_cast<unsigned>(blocks));
  if (!__syncthreads_or(last)) {
    return;
  }
  double rows = 0;
#pragma unroll 1
  for (int64_t f = 0; f < key.features; ++f) {
    const double shift = shift_of(p, f);
    Found mine;
    for (int b = static_cast<int>(threadIdx.x); b < blocks; b += kReturnThreads) {
      const double* const of = p.partials + (f * blocks + b) * kFound;
      mine.add({{of[0], of[1], of[2]}, of[3]});
    }
    const Found all = sum_over_block(mine);
    fold_returns(p, f, all, shift);
    rows = all.rows;
  }
  if (threadIdx.x == 0) {
    fold_count(key.state, rows, p.weights);
  }
}

bool is_alone(const Key& key) { return key.samples * key.features <= kAlone; }

int64_t blocks_of(const Key& key) {
  return std::min((key.samples + kReturnRows - 1) / kReturnRows, kMostBlocks);
}

}  // namespace

cudaError_t allow_returns() {
  const cudaError_t error = load_now(alone_kernel);
  return error != cudaSuccess ? error : load_now(together_kernel);
}

WorkspaceSize returns_workspace(const Returns& of) {
  if (is_alone(of.key)) {
    return {};
  }
  return {static_cast<size_t>(of.key.features * blocks_of(of.key) * kFound), 1};
}

cudaError_t scale_returns(const Returns& of, Discount by, Weights weights,
                          const Rule& rule, Workspace workspace, Stream stream) {
  Limits limits;
  if (const cudaError_t error = current_limits(&limits)) {
    return error;
  }
  const Key& key = of.key;
  if (key.samples == 0 || key.features == 0) {
    return cudaSuccess;
  }
  const bool alone = is_alone(key);
  ReturnsParams p{of, by, weights, rule, key.samples, nullptr, nullptr};
  Launch shape;
  shape.threads = kReturnThreads;
  shape.shared = sizeof(double) * (kFound * (kReturnThreads / kWarp) + 2);
  shape.blocks = 1;
  if (alone) {
    return launch(alone_kernel, shape, stream, p);
  }
  shape.blocks = static_cast<int>(blocks_of(key));
  p.rows_per_block = (key.samples + shape.blocks - 1) / shape.blocks;
  p.partials = workspace.partials;
  p.counter = workspace.counters;
  if (const cudaError_t error = launch(together_kernel, shape, stream, p)) {
    return error;
  }
  return normalize({key}, rule, stream);
}

}  // namespace cuda
}  // namespace vecnorm
