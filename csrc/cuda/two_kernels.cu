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
//   normalize   y = (x - loc) / scale, in the opposite order: what accumulate read last
//               may still be in the L2 cache.
//
// Nothing depends on the order in which blocks run: integer counters say who is last,
// sums are added in the order of the plan.

#include "block.cuh"
#include "launches.h"

namespace vecnorm {
namespace cuda {
namespace {

__device__ void accumulate(const Params& p, const Shared& s, const Place& at) {
  if (at.key->plan.vector == 1) {
    sum_up<double>(p, s, at, sum_values(s, at));
    return;
  }
  dispatch_float(at.key->key.x.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    SumsOf<T> sums(s, at);
    const Walk<T> x(at.key->key.x, at);
    const int n = rows_of(at);
    for (int i = 0; i < n;) {
      const int flush = i + kFlushRows < n ? i + kFlushRows : n;
#pragma unroll 4
      for (; i < flush; ++i) {
        const Vector<T> vector = *x[i];
        if (counts(at.key->key, row_of(at, i))) {
          sums.add(vector.at);
        }
      }
      sums.flush();
    }
    add_tail<T>(at, [&](int v, T value) { sums.add_one(v, value); });
    sums.flush();
    sum_up<T>(p, s, at, sums);
  });
}

__global__ void __launch_bounds__(kBlockThreads)
    accumulate_kernel(const __grid_constant__ Params p) {
  const Shared s{p};
  const Place at = find_place(p, static_cast<int>(blockIdx.x), true);
  const LanePlan& plan = at.key->plan;
  prepare(s, at);
  accumulate(p, s, at);

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
  sum_chunks(s, at, [&](int chunk, int i) {
    return slab[static_cast<int64_t>(chunk) * values + i];
  });
  write_features(p, s, at);
  write_count(p, s, at);
}

template <template <typename> class Map, typename C>
__device__ double* read_maps(const Params& p, const Place& at) {
  double* const maps = reinterpret_cast<double*>(shared_memory());
  for (int f = static_cast<int>(threadIdx.x); f < at.features; f += blockDim.x) {
    const Moments state = read_state(at.key->key.state, at.feature(f));
    set_map<Map, C>(maps, at, f, state, p.eps);
  }
  __syncthreads();
  return maps;
}

template <template <typename> class Map>
__device__ void apply(const Params& p) {
  const Place at = find_place(p, static_cast<int>(gridDim.x - 1 - blockIdx.x), true);
  const Key& key = at.key->key;
  if (at.key->plan.vector == 1) {
    map_values<Map>(read_maps<Map, double>(p, at), at);
    return;
  }
  dispatch_float(key.x.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using C = typename Compute<T>::type;
    constexpr int V = Vector<T>::size;
    const double* maps = read_maps<Map, C>(p, at);
    Map<C> map[V];
    for (int v = 0; v < V; ++v) {
      map[v] = get_map<Map, C>(maps, at, at.lane + v);
    }
    const Walk<T> x(key.x, at);
    const Walk<T> y(key.y, at);
    const int n = rows_of(at);
    for (int i = 0; i < n; i += kBatch) {
      Vector<T> batch[kBatch];
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        if (i + j < n) {
          batch[j] = *x[i + j];
        }
      }
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        if (i + j < n) {
          store_mapped(y[i + j], batch[j], map);
        }
      }
    }
    if (at.has_tail()) {
      map_tail<Map, C>(maps, at);
    }
  });
}

__global__ void __launch_bounds__(kBlockThreads)
    normalize_kernel(const __grid_constant__ Params p) {
  apply<Affine>(p);
}

__global__ void __launch_bounds__(kBlockThreads)
    denormalize_kernel(const __grid_constant__ Params p) {
  apply<InverseAffine>(p);
}

}  // namespace

cudaError_t allow_accumulate(size_t bytes) {
  return allow_shared(accumulate_kernel, bytes);
}

cudaError_t launch_accumulate(const Launch& shape, Stream stream, const Params& p) {
  return launch(accumulate_kernel, shape, stream, p);
}

cudaError_t launch_normalize(const Launch& shape, Stream stream, const Params& p) {
  return launch(normalize_kernel, shape, stream, p);
}

cudaError_t launch_denormalize(const Launch& shape, Stream stream, const Params& p) {
  return launch(denormalize_kernel, shape, stream, p);
}

}  // namespace cuda
}  // namespace vecnorm
