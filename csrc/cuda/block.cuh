// Copyright (c) the torchrl_vecnorm authors.
//
// This source code is licensed under the MIT license found in the
// LICENSE file in the root directory of this source tree.

// What the threads of one block do together: find their place, sum, fold into the
// state. The kernels differ in who reads what the blocks of a slab have found.

#pragma once

#include <type_traits>

#include "../moments.h"
#include "device.h"
#include "params.h"

namespace vecnorm {
namespace cuda {

// Rows that a thread sums in float before it flushes to double.
constexpr int kFlushRows = 64;
// Vectors that a thread has under way at once.
constexpr int kBatch = 4;

// 16 bytes, loaded at once.
template <typename T>
struct alignas(16) Vector {
  static constexpr int size = 16 / sizeof(T);
  T at[size];
};

// ----------------------------------------------------------------------- one value

__device__ inline double load_any(const Matrix& m, int64_t row, int64_t feature) {
  const int64_t i = row * m.row_stride + feature * m.feature_stride;
  double value = 0;
  dispatch_any(m.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    value = load<double>(static_cast<const T*>(m.data)[i]);
  });
  return value;
}

__device__ inline void store_any(const Matrix& m, int64_t row, int64_t feature,
                                 double value) {
  const int64_t i = row * m.row_stride + feature * m.feature_stride;
  dispatch_float(m.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    static_cast<T*>(m.data)[i] = store<T>(value);
  });
}

// The running mean, or a sample while there is none.
__device__ inline double shift_of(const Key& key, const Moments& state, int64_t row,
                                  int64_t f) {
  double shift = state.used > 0 ? state.loc() : load_any(key.x, row, f);
  const Dtype d = key.x.dtype;
  if (d != Dtype::kFloat64 && d != Dtype::kInt32 && d != Dtype::kInt64) {
    shift = static_cast<double>(static_cast<float>(shift));
  }
  return usable(shift) ? shift : 0.;
}

// ------------------------------------------------------------------ where a block is

struct Place {
  const DeviceKey* key;
  int chunk;
  int slab;
  int first_lane;
  int width;     // lanes of the slab
  int features;  // of the slab; lane i is feature i % features
  int lane;      // the thread's first one, within the slab
  int row;       // the thread's first one, within the chunk
  int rows_apart;
  int64_t begin;  // rows of the chunk
  int64_t end;

  __device__ bool is_in() const { return lane < width; }
  __device__ int64_t feature(int f) const {
    return key->plan.group > 1 ? f : first_lane + f;
  }
  // The samples that fill no row of lanes: the last chunk has them.
  __device__ bool has_tail() const {
    return key->plan.group > 1 && chunk == key->plan.chunks - 1;
  }
  __device__ int64_t tail() const { return key->plan.rows * key->plan.group; }
  __device__ int tail_values() const {
    return static_cast<int>(key->key.samples - tail()) * features;
  }
};

// Blocks count through the slabs of a chunk first, or through the chunks of a slab.
__device__ inline Place find_place(const Params& p, int block, bool slabs_first) {
  int k = 0;
  while (block >= p.ends[k]) {
    ++k;
  }
  const int piece = block - (k > 0 ? p.ends[k - 1] : 0);
  Place at;
  at.key = &p.keys[k];
  const LanePlan& plan = at.key->plan;
  at.chunk = slabs_first ? piece / plan.slabs : piece % plan.chunks;
  at.slab = slabs_first ? piece % plan.slabs : piece / plan.chunks;
  at.first_lane = at.slab * plan.slab_lanes;
  at.width = plan.lanes - at.first_lane;
  if (at.width > plan.slab_lanes) {
    at.width = plan.slab_lanes;
  }
  at.features = plan.group > 1 ? plan.features : at.width;
  const int thread = static_cast<int>(threadIdx.x);
  at.lane = thread % plan.columns * plan.vector;
  at.row = thread / plan.columns;
  at.rows_apart = static_cast<int>(blockDim.x) / plan.columns;
  at.begin = at.chunk * plan.rows_per_chunk;
  at.end = at.begin + plan.rows_per_chunk;
  if (at.end > plan.rows) {
    at.end = plan.rows;
  }
  return at;
}

// ------------------------------------------------------------------- shared memory

// Everything in double. `mine` and `total` are n, d1, d2 of each feature of the slab,
// one after the other, then the number of samples; `old` is sum, ssq, missing, var,
// then the count.
struct Shared {
  const Params& p;

  __device__ double* at(int n) const {
    return reinterpret_cast<double*>(shared_memory()) + n;
  }
  __device__ double* flag() const { return at(0); }
  __device__ double* shift() const { return at(1); }
  // The state as it was before the call.
  __device__ double* old() const { return at(1 + p.shared.features); }
  // What this block has found.
  __device__ double* mine() const { return at(2 + 5 * p.shared.features); }
  // What all blocks of the slab have found.
  __device__ double* total() const { return at(3 + 8 * p.shared.features); }
  // Coefficients of the output.
  __device__ double* maps() const { return at(4 + 11 * p.shared.features); }
  __device__ double* scratch() const { return at(4 + 14 * p.shared.features); }
  // 16-byte vectors.
  __device__ char* kept() const { return shared_memory() + p.shared_bytes; }
};

// The first row that counts, for the whole block; 0 where there is none.
__device__ inline int64_t first_row(const Key& key) {
  for (int64_t r = 0; r < key.samples; r += blockDim.x) {
    const int64_t mine = r + static_cast<int>(threadIdx.x);
    if (__syncthreads_or(mine < key.samples && key.mask[mine])) {
      while (!key.mask[r]) {
        ++r;
      }
      return r;
    }
  }
  return 0;
}

// Reads the state, and chooses what to sum around.
__device__ inline void prepare(const Shared& s, const Place& at) {
  const Key& key = at.key->key;
  const int n = at.features;
  // What the mask leaves out can be anything. Only the first calls look for another
  // row.
  int64_t row = 0;
  if (key.mask != nullptr) {
    bool is_new = false;
    for (int f = static_cast<int>(threadIdx.x); f < n; f += blockDim.x) {
      is_new |= !(read_state(key.state, at.feature(f)).used > 0);
    }
    if (__syncthreads_or(is_new)) {
      row = first_row(key);
    }
  }
  for (int f = static_cast<int>(threadIdx.x); f < n; f += blockDim.x) {
    const Moments state = read_state(key.state, at.feature(f));
    s.shift()[f] = shift_of(key, state, row, at.feature(f));
    s.old()[f] = state.sum;
    s.old()[n + f] = state.ssq;
    s.old()[2 * n + f] = state.missing;
    s.old()[3 * n + f] = state.var;
    if (f == 0) {
      s.old()[4 * n] = state.count;
    }
  }
  __syncthreads();
}

// ------------------------------------------------------------------------ summation

// Adds up the rows of `quantities` tables of span × width, which lie `apart` doubles
// from each other, into their first rows: the second half onto the first, and again.
__device__ inline void sum_rows(double* table, int quantities, int apart, int span,
                                int width) {
  while (span > 1) {
    const int half = (span + 1) / 2;
    const int n = (span - half) * width;
    for (int i = static_cast<int>(threadIdx.x); i < n; i += blockDim.x) {
      for (int q = 0; q < quantities; ++q) {
        table[q * apart + i] += table[q * apart + half * width + i];
      }
    }
    __syncthreads();
    span = half;
  }
}

// Adds up Q quantities over the block, feature by feature: find(v, values) for each of
// the thread's lanes, results to the tables s.mine() + to[q] * features.
template <int Q, int kUnroll, typename Find>
__device__ __forceinline__ void sum_block(const Shared& s, const Place& at,
                                          const int (&to)[Q], int lanes, Find find) {
  const int thread = static_cast<int>(threadIdx.x);
  const int columns = at.key->plan.columns;
  // The threads of a warp that have the same lanes go together first.
  const bool in_warp = columns < kWarp;
  const int sharing = in_warp ? kWarp : columns;
  const int rows = static_cast<int>(blockDim.x) / sharing;
  const int apart = rows * at.width;
  const bool writes = at.is_in() && (!in_warp || thread % kWarp < columns);
#pragma unroll kUnroll
  for (int v = 0; v < lanes; ++v) {
    double values[Q];
    find(v, values);
    for (int step = kWarp / 2; step >= columns; step /= 2) {
#pragma unroll
      for (int q = 0; q < Q; ++q) {
        values[q] += shuffle_xor(values[q], step);
      }
    }
    if (writes) {
      const int i = thread / sharing * at.width + at.lane + v;
#pragma unroll
      for (int q = 0; q < Q; ++q) {
        s.scratch()[q * apart + i] = values[q];
      }
    }
  }
  __syncthreads();
  // Lanes of one feature are `features` apart, and so are its rows.
  sum_rows(s.scratch(), Q, apart, apart / at.features, at.features);
  for (int f = thread; f < at.features; f += blockDim.x) {
#pragma unroll
    for (int q = 0; q < Q; ++q) {
      s.mine()[to[q] * at.features + f] = s.scratch()[q * apart + f];
    }
  }
  __syncthreads();  // scratch is free again
}

// Sums in float around the shift. Every value counts: whether one is not finite, the
// sums will say.
template <int V>
struct FloatSums {
  float shift[V];
  float s1[V] = {};
  float s2[V] = {};
  double d1[V] = {};
  double d2[V] = {};

  __device__ FloatSums(const Shared& s, const Place& at) {
    for (int v = 0; v < V; ++v) {
      shift[v] =
          at.is_in() ? static_cast<float>(s.shift()[(at.lane + v) % at.features]) : 0.f;
    }
  }

  template <typename T>
  __device__ void add(const T (&x)[V]) {
    for (int v = 0; v < V; ++v) {
      add_one(v, x[v]);
    }
  }

  template <typename T>
  __device__ void add_one(int v, T x) {
    const float d = load<float>(x) - shift[v];
    s1[v] += d;
    s2[v] += d * d;
  }

  // To be called every kFlushRows rows, and at the end.
  __device__ void flush() {
    for (int v = 0; v < V; ++v) {
      d1[v] += s1[v];
      d2[v] += s2[v];
      s1[v] = 0;
      s2[v] = 0;
    }
  }
};

// Sums in double of the values that are usable: for doubles, and one value at a time.
template <int V>
struct DoubleSums {
  double shift[V];
  Partial sum[V];

  __device__ DoubleSums(const Shared& s, const Place& at) {
    for (int v = 0; v < V; ++v) {
      shift[v] = at.is_in() ? s.shift()[(at.lane + v) % at.features] : 0.;
    }
  }

  __device__ void add(const double (&x)[V]) {
    for (int v = 0; v < V; ++v) {
      add_one(v, x[v]);
    }
  }

  __device__ void add_one(int v, double x) { sum[v] = reduce(sum[v], x, shift[v]); }

  __device__ void flush() {}
};

template <typename T>
using SumsOf = std::conditional_t<std::is_same_v<T, double>, DoubleSums<2>,
                                  FloatSums<Vector<T>::size>>;

__device__ inline bool counts(const Key& key, int64_t row) {
  return key.mask == nullptr || key.mask[row];
}

// Where the thread's first vector is, and how far apart its vectors are.
template <typename T>
struct Walk {
  T* data;
  int64_t step;

  __device__ Walk(const Matrix& m, const Place& at) {
    const int64_t row_stride = at.key->plan.group * m.row_stride;
    data = static_cast<T*>(m.data) + (at.begin + at.row) * row_stride + at.first_lane +
           at.lane;
    step = at.rows_apart * row_stride;
  }
  __device__ Vector<T>* operator[](int i) const {
    return reinterpret_cast<Vector<T>*>(data + i * step);
  }
};

__device__ inline int64_t row_of(const Place& at, int i) {
  return at.begin + at.row + static_cast<int64_t>(i) * at.rows_apart;
}

// How many rows of its lanes the thread has.
__device__ inline int rows_of(const Place& at) {
  const int64_t rows = at.end - at.begin - at.row;
  return at.is_in() && rows > 0
             ? static_cast<int>((rows + at.rows_apart - 1) / at.rows_apart)
             : 0;
}

// The thread's rows, one value of any type and stride at a time.
__device__ __forceinline__ DoubleSums<1> sum_values(const Shared& s, const Place& at) {
  DoubleSums<1> sums(s, at);
  const int n = rows_of(at);
  for (int i = 0; i < n; ++i) {
    const int64_t row = row_of(at, i);
    if (counts(at.key->key, row)) {
      sums.add({load_any(at.key->key.x, row, at.first_lane + at.lane)});
    }
  }
  return sums;
}

// The tail, as one more row that is not whole.
template <typename T, typename Add>
__device__ __forceinline__ void add_tail(const Place& at, Add add) {
  if (at.has_tail() && at.row == 0) {
    const Key& key = at.key->key;
    const T* x =
        static_cast<const T*>(key.x.data) + at.tail() * key.x.row_stride + at.lane;
    for (int v = 0; v < Vector<T>::size; ++v) {
      if (at.lane + v < at.tail_values()) {
        add(v, x[v]);
      }
    }
  }
}

// The thread's rows in double, for what float cannot sum. It is rare, and runs where
// others need their registers: one lane at a time, in two passes.
template <typename T>
__device__ __forceinline__ void sum_again(const Shared& s, const Place& at) {
  constexpr int V = Vector<T>::size;
  const Walk<T> x(at.key->key.x, at);
  const int n = rows_of(at);
  const auto sum = [&](int v) {
    const double shift = at.is_in() ? s.shift()[(at.lane + v) % at.features] : 0.;
    Partial sum;
#pragma unroll 1
    for (int i = 0; i < n; ++i) {
      if (counts(at.key->key, row_of(at, i))) {
        sum = reduce(sum, load<double>(x[i]->at[v]), shift);
      }
    }
    add_tail<T>(at, [&](int lane, T value) {
      if (lane == v) {
        sum = reduce(sum, load<double>(value), shift);
      }
    });
    return sum;
  };
  sum_block<2, 1>(s, at, {1, 2}, V, [&](int v, double (&values)[2]) {
    const Partial p = sum(v);
    values[0] = p.d1;
    values[1] = p.d2;
  });
  sum_block<1, 1>(s, at, {0}, V,
                  [&](int v, double (&values)[1]) { values[0] = sum(v).n; });
}

// The samples of the block's rows, those that count, and the tail's.
__device__ inline double samples_in(const Place& at) {
  const Key& key = at.key->key;
  int64_t rows = at.end > at.begin ? at.end - at.begin : 0;
  if (key.mask != nullptr) {
    rows = 0;
    for (int64_t r = at.begin; r < at.end; r += blockDim.x) {
      const int64_t mine = r + static_cast<int>(threadIdx.x);
      rows += __syncthreads_count(mine < at.end && key.mask[mine]);
    }
  }
  const int64_t tail = at.has_tail() ? key.samples - at.tail() : 0;
  return static_cast<double>(rows * at.key->plan.group + tail);
}

// Brings what the threads have summed into s.mine(); again, if float sums cannot be
// trusted.
template <typename T>
__device__ __forceinline__ void sum_up(const Params& p, const Shared& s,
                                       const Place& at,
                                       const FloatSums<Vector<T>::size>& sums) {
  constexpr int V = Vector<T>::size;
  const int n = at.features;
  const double samples = samples_in(at);
  sum_block<2, V>(s, at, {1, 2}, V, [&](int v, double (&values)[2]) {
    values[0] = sums.d1[v];
    values[1] = sums.d2[v];
  });
  bool bad = false;
  for (int f = static_cast<int>(threadIdx.x); f < n; f += blockDim.x) {
    const double used = Moments::used_of(s.old()[4 * n], s.old()[2 * n + f]);
    const bool is_anchored =
        anchored(used, static_cast<double>(at.key->key.samples), p.weights);
    s.mine()[f] = samples;
    bad =
        bad || !trustworthy(samples, s.mine()[n + f], s.mine()[2 * n + f], is_anchored);
  }
  if (threadIdx.x == 0) {
    s.mine()[3 * n] = samples;
  }
  if (__syncthreads_or(bad)) {
    sum_again<T>(s, at);
  }
}

template <typename T, int V>
__device__ __forceinline__ void sum_up(const Params&, const Shared& s, const Place& at,
                                       const DoubleSums<V>& sums) {
  const double samples = samples_in(at);
  if (threadIdx.x == 0) {
    s.mine()[3 * at.features] = samples;
  }
  sum_block<2, V>(s, at, {1, 2}, V, [&](int v, double (&values)[2]) {
    values[0] = sums.sum[v].d1;
    values[1] = sums.sum[v].d2;
  });
  sum_block<1, V>(s, at, {0}, V,
                  [&](int v, double (&values)[1]) { values[0] = sums.sum[v].n; });
}

// Adds up what the blocks of a slab have found: find(chunk, i) for each value i. The
// threads that share a value each take every so-many-th chunk.
template <typename Find>
__device__ void sum_chunks(const Shared& s, const Place& at, Find find) {
  const int values = 3 * at.features + 1;
  const int chunks = at.key->plan.chunks;
  const int thread = static_cast<int>(threadIdx.x);
  const int threads = static_cast<int>(blockDim.x);
  int width = 1;
  while (width < values && width < threads) {
    width *= 2;
  }
  for (int base = 0; base < values; base += width) {
    const int i = base + thread % width;
    double sum = 0;
    if (i < values) {
#pragma unroll 4
      for (int c = thread / width; c < chunks; c += threads / width) {
        sum += find(c, i);
      }
    }
    __syncthreads();
    s.scratch()[thread] = sum;
    __syncthreads();
    sum_rows(s.scratch(), 1, 0, threads / width, width);
    if (thread < width && i < values) {
      s.total()[i] = s.scratch()[thread];
    }
  }
  __syncthreads();
}

// Whether the caller is the last of `all` to come here. What the others wrote before
// they came can be read after it.
__device__ inline bool comes_last(unsigned* counter, unsigned all) {
  // The top bit belongs to the barrier of the resident kernel.
  const bool last = (fetch_add(counter, 1u) & 0x7fffffffu) == all - 1;
  if (last) {
    *counter = 0;
  }
  return last;
}

// The same for a whole block.
__device__ inline bool block_comes_last(const Shared& s, unsigned* counter,
                                        unsigned all) {
  __syncthreads();
  if (threadIdx.x == 0) {
    *s.flag() = comes_last(counter, all) ? 1 : 0;
  }
  __syncthreads();
  return *s.flag() != 0;
}

// ------------------------------------------------------------------------- the fold

// The state of the slab's feature f with the batch folded in, as it reads once written.
__device__ inline Moments fold_feature(const Params& p, const Shared& s,
                                       const Place& at, int f, double* left_out) {
  const int n = at.features;
  const State& to = at.key->key.state;
  const Partial sum{s.total()[f], s.total()[n + f], s.total()[2 * n + f]};
  Moments state;
  state.sum = s.old()[f];
  state.ssq = s.old()[n + f];
  state.missing = s.old()[2 * n + f];
  state.var = s.old()[3 * n + f];
  state.count = s.old()[4 * n];
  state.weigh();
  Moments batch = unshift(sum, s.shift()[f], s.total()[3 * n]);
  *left_out = batch.missing;
  if (to.nonfinite.data == nullptr) {
    batch = impute(batch, state);
  }
  return rounded(to, fold(state, batch, p.weights));
}

// Folds the batch into the state of the slab's features, but for the count, which other
// slabs may not have read yet.
__device__ inline void write_features(const Params& p, const Shared& s,
                                      const Place& at) {
  if (!(s.total()[3 * at.features] > 0)) {
    return;
  }
  const State& to = at.key->key.state;
  for (int f = static_cast<int>(threadIdx.x); f < at.features; f += blockDim.x) {
    double left_out;
    const Moments state = fold_feature(p, s, at, f, &left_out);
    write_state(to, at.feature(f), at.key->key.features, state, left_out);
  }
}

// Called by one block of each slab once every block of it has read the state: the last
// of them writes the count. One thread does it, the others have better things to do.
__device__ inline void write_count(const Params& p, const Shared& s, const Place& at) {
  const int slabs = at.key->plan.slabs;
  if (threadIdx.x == 0 &&
      (slabs == 1 ||
       comes_last(at.key->counters + slabs, static_cast<unsigned>(slabs))) &&
      s.total()[3 * at.features] > 0) {
    double unused;
    at.key->key.state.write_count(fold_feature(p, s, at, 0, &unused).count,
                                  s.total()[3 * at.features]);
  }
}

// --------------------------------------------------------------------------- output

// The coefficients of the slab's features, as three arrays.
template <template <typename> class Map, typename C>
__device__ void set_map(double* maps, const Place& at, int f, const Moments& state,
                        double eps) {
  C* to = reinterpret_cast<C*>(maps);
  const auto [a, b, c] =
      Map<C>::of(statistic(state, eps, at.key->key.state.rounding()));
  to[f] = a;
  to[at.features + f] = b;
  to[2 * at.features + f] = c;
}

template <template <typename> class Map, typename C>
__device__ Map<C> get_map(const double* maps, const Place& at, int lane) {
  const C* from = reinterpret_cast<const C*>(maps);
  const int f = lane % at.features;
  return {from[f], from[at.features + f], from[2 * at.features + f]};
}

// `from` is a copy, so that it is loaded at once: `to` may be where it came from.
template <typename T, typename M, int V>
__device__ void store_mapped(Vector<T>* to, const Vector<T> from, const M (&map)[V]) {
  Vector<T> out;
  for (int v = 0; v < V; ++v) {
    out.at[v] = store<T>(map[v](load<typename Compute<T>::type>(from.at[v])));
  }
  store_streaming(to, out);
}

// The block's values, one at a time.
template <template <typename> class Map>
__device__ void map_values(const double* maps, const Place& at) {
  if (!at.is_in()) {
    return;
  }
  const Key& key = at.key->key;
  const auto map = get_map<Map, double>(maps, at, at.lane);
  const int64_t f = at.first_lane + at.lane;
  for (int64_t r = at.begin + at.row; r < at.end; r += at.rows_apart) {
    store_any(key.y, r, f, map(load_any(key.x, r, f)));
  }
}

// The samples of the tail.
template <template <typename> class Map, typename C>
__device__ void map_tail(const double* maps, const Place& at) {
  const Key& key = at.key->key;
  const int64_t values = (key.samples - at.tail()) * key.features;
#pragma unroll 1
  for (int64_t i = threadIdx.x; i < values; i += blockDim.x) {
    const int64_t r = at.tail() + i / key.features;
    const int64_t f = i % key.features;
    const auto map = get_map<Map, C>(maps, at, static_cast<int>(f));
    store_any(key.y, r, f, map(static_cast<C>(load_any(key.x, r, f))));
  }
}

}  // namespace cuda
}  // namespace vecnorm
