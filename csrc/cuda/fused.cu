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
// the state that it read before it met the others; the one with the fewest rows writes
// the state, when it has written its outputs. A block that has a slab alone meets
// nobody.

#include "block.cuh"
#include "launches.h"

namespace vecnorm {
namespace cuda {
namespace {

// Reads the state, and the phase of the slab's barrier, before this block adds to it.
template <bool kCluster>
__device__ __forceinline__ void prepare_slab(const Shared& s, const Place& at) {
  const bool waits = !kCluster && threadIdx.x == 0;
  const unsigned phase = waits ? load_relaxed(at.key->counters + at.slab) & kPhase : 0;
  prepare(s, at);
  if (waits) {
    *s.phase() = phase;
  }
}

// Waits for all blocks of a slab. One adds what takes the sum of all to 2³¹: the top
// bit flips, the others are zero again, and the next call finds a barrier like this.
__device__ void wait_for_slab(const Shared& s, unsigned* word, int chunk, int chunks) {
  __syncthreads();
  if (threadIdx.x == 0) {
    const unsigned phase = *s.phase();
    add_release(word, chunk == 0 ? kPhase - static_cast<unsigned>(chunks - 1) : 1u);
    while (((load_acquire(word) ^ phase) & kPhase) == 0) {
      pause();
    }
  }
  __syncthreads();
}

// From mine() of the slab's blocks to total() of each.
template <bool kCluster>
__device__ __forceinline__ void exchange(const Shared& s, const Place& at) {
  constexpr int kAtOnce = 8;
  const LanePlan& plan = at.key->plan;
  const int values = 3 * at.features + 1;
  if (plan.chunks == 1) {
    for (int i = static_cast<int>(threadIdx.x); i < values; i += blockDim.x) {
      s.total()[i] = s.mine()[i];
    }
    __syncthreads();
  } else if constexpr (kCluster) {
    cluster_arrive();
    cluster_wait();
    sum_chunks<kAtOnce>(
        s, at, [&](int chunk, int i) { return load_peer(s.mine() + i, chunk); });
    // No block may end, and its memory with it, while others read s.mine(): leave().
    cluster_arrive_relaxed();
  } else {
    double* const slab =
        at.key->partials + static_cast<int64_t>(at.slab) * plan.chunks * plan.values();
    for (int i = static_cast<int>(threadIdx.x); i < values; i += blockDim.x) {
      slab[static_cast<int64_t>(at.chunk) * values + i] = s.mine()[i];
    }
    wait_for_slab(s, at.key->counters + at.slab, at.chunk, plan.chunks);
    sum_chunks<kAtOnce>(s, at, [&](int chunk, int i) {
      return slab[static_cast<int64_t>(chunk) * values + i];
    });
  }
}

// Writes the state, in the block that leads its slab.
template <bool kCluster>
__device__ __forceinline__ void leave(const Shared& s, const Place& at,
                                      unsigned before) {
  if (at.leads()) {
    write_features(s, at);
    if (threadIdx.x == 0) {
      write_count(s, at, before);
    }
  }
  if constexpr (kCluster) {
    if (at.key->plan.chunks > 1) {
      cluster_wait();
    }
  }
}

// The new statistics, in every block. Returns what leave() needs to know: asked for
// here, the answer is there when the outputs are written.
template <typename C>
__device__ __forceinline__ unsigned fold_slab(const Params& p, const Shared& s,
                                              const Place& at) {
  for (int f = static_cast<int>(threadIdx.x); f < at.features; f += blockDim.x) {
    set_map<Affine, C>(s.maps(), at, f, fold_feature(p, s, at, f), p.rule);
  }
  __syncthreads();
  return at.leads() && threadIdx.x == 0 ? give_up_count(at) : 0;
}

template <bool kCluster>
__device__ __forceinline__ void update_values(const Params& p, const Shared& s,
                                              const Place& at) {
  prepare_slab<kCluster>(s, at);
  sum_up_values(p, s, at);
  exchange<kCluster>(s, at);
  unsigned before;
  if (maps_in_float(at.key->key)) {
    before = fold_slab<float>(p, s, at);
    map_values<Affine, float>(p, s.maps(), at);
  } else {
    before = fold_slab<double>(p, s, at);
    map_values<Affine, double>(p, s.maps(), at);
  }
  leave<kCluster>(s, at, before);
}

template <bool kCluster, typename T>
__device__ __forceinline__ void update_vectors(const Params& p, const Shared& s,
                                               Place at) {
  using C = typename Compute<T>::type;
  constexpr int V = Vector<T>::size;
  constexpr int R = held_of(dtype_of<T>);
  const Key& key = at.key->key;
  const Walk<T> x(key.x, at);
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
  prepare_slab<kCluster>(s, at);  // while those are under way
  Marks marks;
  const unsigned counts = marks.take<R>(at, 0, n);
  SumsOf<T> sums(s, at);
#pragma unroll
  for (int i = 0; i < R; ++i) {
    if (i < n && (counts >> i & 1) != 0) {
      sums.add(held[i].at);
    }
  }
  in_batches<kBatch>(n - R, [&](int i, auto size) {
    const int first = R + i;
    if (first % kFlushRows < kBatch) {
      sums.flush();
    }
    Vector<T> batch[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      if (j < size) {
        batch[j] = *x[first + j];
      }
    }
    const unsigned counts = marks.take<kBatch>(at, first, n);
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      if (first + j < kept) {
        *slot(first + j) = batch[j];
      }
      if (j < size && (counts >> j & 1) != 0) {
        sums.add(batch[j].at);
      }
    }
  });
  add_tail<T>(at, [&](int v, T value) { sums.add_one(v, value); });
  sums.flush();
  sum_up(p, s, at, sums, marks, [&] { sum_again<T>(s, at); });
  at = find_place<kFusedThreads, false>(p, opaque(blockIdx.x));
  exchange<kCluster>(s, at);
  const unsigned before = fold_slab<C>(p, s, at);
  at = find_place<kFusedThreads, false>(p, opaque(blockIdx.x));
  const Walk<T> from(at.key->key.x, at);
  const Walk<Output<T>> y(at.key->key.y, at);
  Affine<C> map[V];
  get_maps<Affine>(s.maps(), at, map);
  in_batches<kBatch>(n - kept, [&](int i, auto size) {
    const int last = n - 1 - i;
    Vector<T> batch[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      if (j < size) {
        batch[j] = *from[last - j];
      }
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      if (j < size) {
        store_mapped<T>(p, y[last - j], batch[j], map);
      }
    }
  });
#pragma unroll 2
  for (int i = kept - 1; i >= R; --i) {
    store_mapped<T>(p, y[i], *slot(i), map);
  }
#pragma unroll
  for (int i = R - 1; i >= 0; --i) {
    if (i < n) {
      store_mapped<T>(p, y[i], held[i], map);
    }
  }
  if (at.has_tail()) {
    map_tail<Affine, C>(p, s.maps(), at);
  }
  leave<kCluster>(s, at, before);
}

template <bool kCluster, typename T>
__device__ __forceinline__ void update_slab(const Params& p) {
  const Shared s{p};
  const Place at = find_place<kFusedThreads, false>(p, static_cast<int>(blockIdx.x));
  if constexpr (kTakesValues<T>) {
    if (at.key->plan.vector == 1) {
      return update_values<kCluster>(p, s, at);
    }
  }
  update_vectors<kCluster, T>(p, s, at);
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
  int size = 1;
  for (int& of_a_size : limits->clusters) {
    size *= 2;
    if (of_a_size > 0) {
      if (const cudaError_t error = clusters_at_once(
              cluster_kernel<T>, size, kFusedThreads, limits->shared, &of_a_size)) {
        return error;
      }
    }
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t allow_fused(Limits* limits) {
  for (const auto allow_type :
       {allow<float>, allow<double>, allow<Float16>, allow<BFloat16>, allow<uint8_t>}) {
    if (const cudaError_t error = allow_type(limits)) {
      return error;
    }
  }
  return cudaSuccess;
}

cudaError_t launch_fused(Dtype dtype, const Launch& shape, Stream stream,
                         const Params& p) {
  return dispatch_kernel(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return launch(shape.cooperative ? resident_kernel<T> : cluster_kernel<T>, shape,
                  stream, p);
  });
}

}  // namespace cuda
}  // namespace vecnorm
