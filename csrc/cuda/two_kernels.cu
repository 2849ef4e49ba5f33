// Copyright (c) the torchrl_vecnorm authors.
//
// This source code is licensed under the MIT license found in the
// LICENSE file in the root directory of this source tree.

// update() as two launches, for any size and any GPU; normalize() and denormalize().
//
//   accumulate  a block sums d and d² of its rows and lanes around the key's shift, in
//               float within a thread, flushed to double, and in double from the block
//               on; sums that cannot be trusted (moments.h) are taken again in double.
//               The last block of a slab to finish adds up the sums of all of them in
//               order, and folds them into the state; the last slab of a key writes its
//               count, which the others have read by then.
//   normalize   y = (x - loc) / scale, from the last row of a block to its first: what
//               accumulate read last may still be in the L2 cache.
//
// Nothing depends on the order in which blocks run: integer counters say who is last,
// sums are added in the order of the plan.

#include "block.cuh"
#include "launches.h"

namespace vecnorm {
namespace cuda {
namespace {

// Vectors that a thread has under way at once: with kSumBlocks blocks, enough to keep
// the memory busy.
template <typename T>
constexpr int kSumBatch = sizeof(T) == 2 ? 4 : 8;

template <typename T>
__device__ __forceinline__ void accumulate(const Params& p, const Shared& s,
                                           const Place& at) {
  constexpr int kBatch = kSumBatch<T>;
  if constexpr (kTakesValues<T>) {
    if (at.key->plan.vector == 1) {
      prepare(s, at);
      return sum_up_values(p, s, at);
    }
  }
  const Walk<T> x(at.key->key.x, at);
  const int n = rows_of(at);
  Vector<T> batch[kBatch];
  const auto load_batch = [&](int i, int size) {
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      if (j < size) {
        batch[j] = *x[i + j];
      }
    }
  };
  load_batch(0, n);
  prepare(s, at);  // while those are under way
  SumsOf<T> sums(s, at);
  Marks marks;
  const auto add_batch = [&](int i, int size) {
    const unsigned counts = marks.take<kBatch>(at, i, n);
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      if (j < size && (counts >> j & 1) != 0) {
        sums.add(batch[j].at);
      }
    }
  };
  add_batch(0, n);
  in_batches<kBatch>(n - kBatch, [&](int i, auto size) {
    const int first = kBatch + i;
    if (first % kFlushRows < kBatch) {
      sums.flush();
    }
    load_batch(first, size);
    add_batch(first, size);
  });
  add_tail<T>(at, [&](int v, T value) { sums.add_one(v, value); });
  sums.flush();
  sum_up(p, s, at, sums, marks, [&] { sum_again<T>(s, at); });
}

template <typename T>
__global__ void __launch_bounds__(kBlockThreads, kSumBlocks)
    accumulate_kernel(const __grid_constant__ Params p) {
  constexpr int kAtOnce = 16;
  const Shared s{p};
  const Place at = find_place<kBlockThreads, true>(p, static_cast<int>(blockIdx.x));
  const LanePlan& plan = at.key->plan;
  accumulate<T>(p, s, at);

  const int values = 3 * at.features + 1;
  double* const slab =
      at.key->partials + static_cast<int64_t>(at.slab) * plan.chunks * plan.values();
  for (int i = static_cast<int>(threadIdx.x); i < values; i += blockDim.x) {
    slab[static_cast<int64_t>(at.chunk) * values + i] = s.mine()[i];
  }
  if (!block_comes_last(s, at.key->counters + at.slab,
                        static_cast<unsigned>(plan.chunks))) {
    return;
  }
  sum_chunks<kAtOnce>(s, at, [&](int chunk, int i) {
    return slab[static_cast<int64_t>(chunk) * values + i];
  });
  for (int f = static_cast<int>(threadIdx.x); f < at.features; f += blockDim.x) {
    fold_feature(p, s, at, f);
  }
  write_features(s, at);
  if (threadIdx.x == 0) {
    write_count(s, at, give_up_count(at));
  }
}

template <template <typename> class Map, typename C>
__device__ double* read_maps(const Params& p, const Place& at) {
  double* const maps = reinterpret_cast<double*>(shared_memory());
  for (int f = static_cast<int>(threadIdx.x); f < at.features; f += blockDim.x) {
    const Moments state = read_state(at.key->key.state, at.feature(f));
    set_map<Map, C>(maps, at, f, state, p.rule);
  }
  __syncthreads();
  return maps;
}

template <template <typename> class Map, typename T>
__device__ void apply(const Params& p) {
  using C = typename Compute<T>::type;
  const Place at =
      find_place<kBlockThreads, true>(p, static_cast<int>(gridDim.x - 1 - blockIdx.x));
  const Key& key = at.key->key;
  if constexpr (kTakesValues<T>) {
    if (at.key->plan.vector == 1) {
      return maps_in_float(key)
                 ? map_values<Map, float>(p, read_maps<Map, float>(p, at), at)
                 : map_values<Map, double>(p, read_maps<Map, double>(p, at), at);
    }
  }
  const Walk<T> x(key.x, at);
  const Walk<Output<T>> y(key.y, at);
  const int n = rows_of(at);
  Vector<T> batch[kBatch];
  const auto load_batch = [&](int i, int size) {
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      if (j < size) {
        batch[j] = *x[n - 1 - i - j];
      }
    }
  };
  load_batch(0, n);
  const double* maps = read_maps<Map, C>(p, at);  // while those are under way
  Map<C> map[Vector<T>::size];
  get_maps<Map>(maps, at, map);
  const auto store_batch = [&](int i, int size) {
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      if (j < size) {
        store_mapped<T>(p, y[n - 1 - i - j], batch[j], map);
      }
    }
  };
  store_batch(0, n);
  in_batches<kBatch>(n - kBatch, [&](int i, auto size) {
    load_batch(kBatch + i, size);
    store_batch(kBatch + i, size);
  });
  if (at.has_tail()) {
    map_tail<Map, C>(p, maps, at);
  }
}

template <typename T>
__global__ void __launch_bounds__(kBlockThreads, kMapBlocks)
    normalize_kernel(const __grid_constant__ Params p) {
  apply<Affine, T>(p);
}

template <typename T>
__global__ void __launch_bounds__(kBlockThreads, kMapBlocks)
    denormalize_kernel(const __grid_constant__ Params p) {
  apply<InverseAffine, T>(p);
}

template <typename T>
cudaError_t allow(size_t bytes) {
  for (auto kernel : {normalize_kernel<T>, denormalize_kernel<T>}) {
    if (const cudaError_t error = load_now(kernel)) {
      return error;
    }
  }
  return allow_shared(accumulate_kernel<T>, bytes);
}

}  // namespace

cudaError_t allow_two_kernels(size_t bytes) {
  for (const auto allow_type :
       {allow<float>, allow<double>, allow<Float16>, allow<BFloat16>, allow<uint8_t>}) {
    if (const cudaError_t error = allow_type(bytes)) {
      return error;
    }
  }
  return cudaSuccess;
}

cudaError_t launch_accumulate(Dtype dtype, const Launch& shape, Stream stream,
                              const Params& p) {
  return dispatch_kernel(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return launch(accumulate_kernel<T>, shape, stream, p);
  });
}

cudaError_t launch_normalize(Dtype dtype, const Launch& shape, Stream stream,
                             const Params& p) {
  return dispatch_kernel(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return launch(normalize_kernel<T>, shape, stream, p);
  });
}

cudaError_t launch_denormalize(Dtype dtype, const Launch& shape, Stream stream,
                               const Params& p) {
  return dispatch_kernel(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return launch(denormalize_kernel<T>, shape, stream, p);
  });
}

}  // namespace cuda
}  // namespace vecnorm
