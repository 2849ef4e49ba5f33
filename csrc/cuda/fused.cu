// Copyright (c) the torchrl_vecnorm authors.
//
// This source code is licensed under the MIT license found in the
// LICENSE file in the root directory of this source tree.

// update() as one launch: a block reads its rows of a slab once, keeps them in
// registers and shared memory while the blocks of the slab tell each other what they
// found, and writes them normalised.
//
//   cluster   the blocks of a slab are a cluster (sm_90), and read each other's sums
//             from shared memory. For sizes that this can hold.
//   resident  the blocks of a slab leave their sums in global memory and wait for each
//             other; they are all there, since the launch is cooperative. What does not
//             fit on the chip is read last, and read again first, from the L2 cache as
//             far as that goes.
//
// Every block of a slab adds up all sums, in the order of the plan, and folds them into
// the state that it read before it met the others; one of them writes the state.

#include "block.cuh"
#include "launches.h"

namespace vecnorm {
namespace cuda {
namespace {

// Waits for all blocks of a slab. One adds what takes the sum of all to 2³¹: the top
// bit flips, the others are zero again, and the next call finds a barrier like this.
__device__ void wait_for_slab(unsigned* word, int chunk, int chunks) {
  __syncthreads();
  if (threadIdx.x == 0) {
    const unsigned add =
        chunk == 0 ? 0x80000000u - static_cast<unsigned>(chunks - 1) : 1u;
    const unsigned before = fetch_add(word, add);
    while (((before ^ load_acquire(word)) & 0x80000000u) == 0) {
      pause();
    }
  }
  __syncthreads();
}

// From mine() of the slab's blocks to total() of each.
template <bool kCluster>
__device__ __forceinline__ void exchange(const Shared& s, const Place& at) {
  const LanePlan& plan = at.key->plan;
  if constexpr (kCluster) {
    cluster_arrive();
    cluster_wait();
    sum_chunks(s, at, [&](int chunk, int i) { return peer(s.mine(), chunk)[i]; });
    // No block may end, and its memory with it, while others read s.mine(): leave().
    cluster_arrive();
  } else {
    const int values = 3 * at.features + 1;
    double* const slab =
        at.key->partials + static_cast<int64_t>(at.slab) * plan.chunks * plan.values();
    for (int i = static_cast<int>(threadIdx.x); i < values; i += blockDim.x) {
      slab[static_cast<int64_t>(at.chunk) * values + i] = s.mine()[i];
    }
    wait_for_slab(at.key->counters + at.slab, at.chunk, plan.chunks);
    sum_chunks(s, at, [&](int chunk, int i) {
      return slab[static_cast<int64_t>(chunk) * values + i];
    });
  }
}

template <bool kCluster>
__device__ __forceinline__ void leave(const Params& p, const Shared& s,
                                      const Place& at) {
  if (at.chunk == 0) {
    write_features(p, s, at);
  }
  if constexpr (kCluster) {
    cluster_wait();
  }
}

// The new statistics, in every block. The first one of the slab writes them: the count
// now, the rest when it has written its outputs.
template <typename C>
__device__ __forceinline__ void fold_slab(const Params& p, const Shared& s,
                                          const Place& at) {
  for (int f = static_cast<int>(threadIdx.x); f < at.features; f += blockDim.x) {
    double unused;
    set_map<Affine, C>(s.maps(), at, f, fold_feature(p, s, at, f, &unused), p.eps);
  }
  __syncthreads();
  if (at.chunk == 0) {
    write_count(p, s, at);
  }
}

template <bool kCluster>
__device__ __forceinline__ void update_values(const Params& p, const Shared& s,
                                              const Place& at) {
  prepare(s, at);
  sum_up<double>(p, s, at, sum_values(s, at));
  exchange<kCluster>(s, at);
  fold_slab<double>(p, s, at);
  map_values<Affine>(s.maps(), at);
}

template <bool kCluster, typename T>
__device__ __forceinline__ void update_vectors(const Params& p, const Shared& s,
                                               const Place& at) {
  using C = typename Compute<T>::type;
  constexpr int V = Vector<T>::size;
  constexpr int R = sizeof(T) == 2 ? kHeldHalf : kHeld;
  // Sums of eight lanes leave fewer registers.
  constexpr int kBatch = sizeof(T) == 2 ? 2 : cuda::kBatch;
  const Key& key = at.key->key;
  const Walk<T> x(key.x, at);
  const Walk<T> y(key.y, at);
  const int n = rows_of(at);
  const int kept = n < R + p.slots ? n : R + p.slots;
  // The thread's own slots: no other thread reads them.
  Vector<T>* const slots = reinterpret_cast<Vector<T>*>(s.kept()) + threadIdx.x;
  const auto slot = [&](int i) {
    return slots + (i - R) * static_cast<int>(blockDim.x);
  };

  Vector<T> held[R];
#pragma unroll
  for (int i = 0; i < R; ++i) {
    if (i < n) {
      held[i] = *x[i];
    }
  }
  prepare(s, at);  // while those are under way
  SumsOf<T> sums(s, at);
#pragma unroll
  for (int i = 0; i < R; ++i) {
    if (i < n && counts(key, row_of(at, i))) {
      sums.add(held[i].at);
    }
  }
  for (int first = R; first < n; first += kBatch) {
    if (first % kFlushRows < kBatch) {
      sums.flush();
    }
    Vector<T> batch[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      if (first + j < n) {
        batch[j] = *x[first + j];
      }
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      if (first + j < kept) {
        *slot(first + j) = batch[j];
      }
      if (first + j < n && counts(key, row_of(at, first + j))) {
        sums.add(batch[j].at);
      }
    }
  }
  add_tail<T>(at, [&](int v, T value) { sums.add_one(v, value); });
  sums.flush();
  sum_up<T>(p, s, at, sums);
  exchange<kCluster>(s, at);
  fold_slab<C>(p, s, at);

  Affine<C> map[V];
  if (at.is_in()) {
    for (int v = 0; v < V; ++v) {
      map[v] = get_map<Affine, C>(s.maps(), at, at.lane + v);
    }
  }
  for (int last = n - 1; last >= kept; last -= kBatch) {
    Vector<T> batch[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      if (last - j >= kept) {
        batch[j] = *x[last - j];
      }
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      if (last - j >= kept) {
        store_mapped(y[last - j], batch[j], map);
      }
    }
  }
#pragma unroll 2
  for (int i = kept - 1; i >= R; --i) {
    store_mapped(y[i], *slot(i), map);
  }
#pragma unroll
  for (int i = R - 1; i >= 0; --i) {
    if (i < n) {
      store_mapped(y[i], held[i], map);
    }
  }
  if (at.has_tail()) {
    map_tail<Affine, C>(s.maps(), at);
  }
}

template <bool kCluster, typename T>
__device__ __forceinline__ void update_slab(const Params& p) {
  const Shared s{p};
  const Place at = find_place(p, static_cast<int>(blockIdx.x), false);
  if (at.key->plan.vector == 1) {
    update_values<kCluster>(p, s, at);
  } else {
    update_vectors<kCluster, T>(p, s, at);
  }
  leave<kCluster>(p, s, at);
}

template <typename T>
__global__ void __launch_bounds__(kFusedThreads, 1)
    cluster_kernel(const __grid_constant__ Params p) {
  if constexpr (kHasClusters) {
    update_slab<true, T>(p);
  }
}

template <typename T>
__global__ void __launch_bounds__(kFusedThreads, 1)
    resident_kernel(const __grid_constant__ Params p) {
  update_slab<false, T>(p);
}

}  // namespace

namespace {

template <typename T>
cudaError_t allow(Limits* limits) {
  for (auto kernel : {cluster_kernel<T>, resident_kernel<T>}) {
    if (const cudaError_t error = allow_shared(kernel, limits->shared)) {
      return error;
    }
  }
  int blocks = 0;
  if (const cudaError_t error =
          blocks_at_once(resident_kernel<T>, kFusedThreads, limits->shared, &blocks)) {
    return error;
  }
  limits->cooperative = limits->cooperative && blocks > 0;
  if (limits->clusters > 0) {
    int clusters = 0;
    if (const cudaError_t error = clusters_at_once(
            cluster_kernel<T>, kMaxCluster, kFusedThreads, limits->shared, &clusters)) {
      return error;
    }
    limits->clusters = clusters;
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t allow_fused(Limits* limits) {
  for (const auto allow_type :
       {allow<float>, allow<double>, allow<Float16>, allow<BFloat16>}) {
    if (const cudaError_t error = allow_type(limits)) {
      return error;
    }
  }
  return cudaSuccess;
}

cudaError_t launch_fused(Dtype dtype, const Launch& shape, Stream stream,
                         const Params& p) {
  const bool resident = shape.cooperative;
  switch (dtype) {
    case Dtype::kFloat64:
      return launch(resident ? resident_kernel<double> : cluster_kernel<double>, shape,
                    stream, p);
    case Dtype::kFloat16:
      return launch(resident ? resident_kernel<Float16> : cluster_kernel<Float16>,
                    shape, stream, p);
    case Dtype::kBFloat16:
      return launch(resident ? resident_kernel<BFloat16> : cluster_kernel<BFloat16>,
                    shape, stream, p);
    default:
      return launch(resident ? resident_kernel<float> : cluster_kernel<float>, shape,
                    stream, p);
  }
}

}  // namespace cuda
}  // namespace vecnorm
