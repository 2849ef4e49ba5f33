// Copyright (c) the torchrl_vecnorm authors.
//
// This source code is licensed under the MIT license found in the
// LICENSE file in the root directory of this source tree.

// What the threads of one block do together: find their place, sum, fold into the
// state. The kernels differ in who reads what the blocks of a slab have found.

#pragma once

#include <cstring>
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
// Single values, and those that are summed in float.
constexpr int kValuesAtOnce = 8;
constexpr int kSummedAtOnce = 16;

// What a thread loads at once: 16 bytes, or four bytes of images, whose outputs are 16.
template <typename T>
struct alignas(sizeof(T) == 1 ? 4 : 16) Vector {
  static constexpr int size = sizeof(T) == 1 ? 4 : 16 / sizeof(T);
  T at[size];
};
static_assert(sizeof(Vector<uint8_t>) == kSmallVector && sizeof(Vector<float>) == 16);

template <typename T>
constexpr Dtype dtype_of = Dtype::kFloat32;
template <>
constexpr Dtype dtype_of<double> = Dtype::kFloat64;
template <>
constexpr Dtype dtype_of<Float16> = Dtype::kFloat16;
template <>
constexpr Dtype dtype_of<BFloat16> = Dtype::kBFloat16;
template <>
constexpr Dtype dtype_of<uint8_t> = Dtype::kUInt8;

// What T comes out as.
template <typename T>
using Output = std::conditional_t<std::is_same_v<T, uint8_t>, float, T>;

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

// Up to K values of a column of any type that Bits can hold: loaded as they are, so
// that all are under way before the first one is converted.
template <typename Bits, int K>
struct ColumnOf {
  static constexpr int size = K;
  Bits bits[K];

  __device__ __forceinline__ void load_from(const Matrix& m, int64_t first,
                                            int64_t step, int n) {
    switch (value_size(m.dtype)) {
      case 1:
        return fetch(static_cast<const uint8_t*>(m.data) + first, step, n);
      case 2:
        return fetch(static_cast<const uint16_t*>(m.data) + first, step, n);
      case 4:
        return fetch(static_cast<const uint32_t*>(m.data) + first, step, n);
      default:
        if constexpr (sizeof(Bits) == 8) {
          fetch(static_cast<const uint64_t*>(m.data) + first, step, n);
        }
    }
  }

  template <typename Loaded>
  __device__ void fetch(const Loaded* from, int64_t step, int n) {
#pragma unroll
    for (int j = 0; j < K; ++j) {
      bits[j] = j < n ? from[j * step] : 0;
    }
  }

  template <typename C>
  __device__ void convert(Dtype dtype, C (&to)[K]) const {
    dispatch_any(dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      if constexpr (sizeof(T) <= sizeof(Bits)) {
#pragma unroll
        for (int j = 0; j < K; ++j) {
          T value;
          std::memcpy(&value, &bits[j], sizeof(value));  // GPUs are little-endian
          to[j] = load<C>(value);
        }
      }
    });
  }
};
using Column = ColumnOf<uint64_t, kValuesAtOnce>;

// Whether the kernel for T takes keys without vectors.
template <typename T>
constexpr bool kTakesValues = std::is_same_v<T, float>;

// Whether float holds every value of a type.
__device__ inline bool fits_float(Dtype d) {
  return d != Dtype::kFloat64 && d != Dtype::kInt32 && d != Dtype::kInt64;
}

// The running mean, or a sample while there is none.
__device__ inline double shift_of(const Key& key, const Moments& state, int64_t row,
                                  int64_t f) {
  double shift = state.used > 0 ? state.loc() : load_any(key.x, row, f);
  if (fits_float(key.x.dtype)) {
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
  int width;       // lanes of the slab
  int features;    // of the slab; lane i is feature i % features
  int lane;        // the thread's first one, within the slab
  int row;         // the thread's first one, within the chunk
  int rows_shift;  // its rows are 1 << rows_shift apart
  int rows;        // of the chunk
  int64_t begin;   // the first one

  __device__ bool is_in() const { return lane < width; }
  __device__ int rows_apart() const { return 1 << rows_shift; }
  // The feature of the thread's first lane, and the one of the lane after that of f.
  __device__ int first_feature() const {
    return key->plan.group > 1 ? lane - key->by_features.divide(lane) * features : lane;
  }
  __device__ int next_feature(int f) const { return f + 1 == features ? 0 : f + 1; }
  // The block that writes what its slab has found: the one that has the fewest rows.
  __device__ bool leads() const { return chunk == key->plan.chunks - 1; }
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
// Without a division: dozens of instructions each, before the first value is asked for.
template <int kThreads, bool kSlabsFirst>
__device__ __forceinline__ Place find_place(const Params& p, int block) {
  int k = 0;
  while (block >= p.ends[k]) {
    ++k;
  }
  const int piece = block - (k > 0 ? p.ends[k - 1] : 0);
  Place at;
  at.key = &p.keys[k];
  const LanePlan& plan = at.key->plan;
  const int whole = at.key->by_inner.divide(piece);
  const int part = piece - whole * (kSlabsFirst ? plan.slabs : plan.chunks);
  at.chunk = kSlabsFirst ? whole : part;
  at.slab = kSlabsFirst ? part : whole;
  at.first_lane = at.slab * plan.slab_lanes;
  at.width = plan.lanes - at.first_lane;
  if (at.width > plan.slab_lanes) {
    at.width = plan.slab_lanes;
  }
  at.features = plan.group > 1 ? plan.features : at.width;
  const int thread = static_cast<int>(threadIdx.x);
  at.lane = (thread & (plan.columns() - 1)) * plan.vector;
  at.row = thread >> plan.columns_shift;
  at.rows_shift = log2_of(kThreads) - plan.columns_shift;
  at.begin = at.chunk * plan.rows_per_chunk;
  const int64_t left = plan.rows - at.begin;
  at.rows = static_cast<int>(left < plan.rows_per_chunk ? left : plan.rows_per_chunk);
  return at;
}

// ------------------------------------------------------------------- shared memory

// Everything in double. `mine` and `total` are n, d1, d2 of each feature of the slab,
// one after the other, then the number of samples; `old` is sum, ssq, missing, var and
// the values left out so far, then the count.
struct Shared {
  const Params& p;

  __device__ double* at(int n) const {
    return reinterpret_cast<double*>(shared_memory()) + n;
  }
  // Words of the kernels with and without a barrier.
  __device__ unsigned* phase() const { return reinterpret_cast<unsigned*>(at(0)); }
  __device__ double* flag() const { return at(0); }
  // The count as folded.
  __device__ double* count() const { return at(1); }
  __device__ double* shift() const { return at(2); }
  // The state as it was before the call, then as folded, but for the count.
  __device__ double* old() const { return at(2 + p.shared.features); }
  // What this block has found.
  __device__ double* mine() const { return at(3 + 6 * p.shared.features); }
  // What all blocks of the slab have found.
  __device__ double* total() const { return at(4 + 9 * p.shared.features); }
  // Coefficients of the output.
  __device__ double* maps() const { return at(5 + 12 * p.shared.features); }
  __device__ double* scratch() const { return at(5 + 15 * p.shared.features); }
  // Vectors.
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
    s.old()[4 * n + f] = key.state.nonfinite.data != nullptr
                             ? key.state.nonfinite.read(key.features + at.feature(f))
                             : 0.;
    if (f == 0) {
      s.old()[5 * n] = state.count;
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
  const int columns = at.key->plan.columns();
  // The threads of a warp that have the same lanes go together first.
  const bool in_warp = columns < kWarp;
  const int sharing = in_warp ? log2_of(kWarp) : at.key->plan.columns_shift;
  const int rows = static_cast<int>(blockDim.x) >> sharing;
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
      const int i = (thread >> sharing) * at.width + at.lane + v;
#pragma unroll
      for (int q = 0; q < Q; ++q) {
        s.scratch()[q * apart + i] = values[q];
      }
    }
  }
  __syncthreads();
  // Lanes of one feature are `features` apart, and so are its rows.
  sum_rows(s.scratch(), Q, apart, rows * at.key->plan.group, at.features);
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
    int f = at.first_feature();
    for (int v = 0; v < V; ++v) {
      shift[v] = at.is_in() ? static_cast<float>(s.shift()[f]) : 0.f;
      f = at.next_feature(f);
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
    int f = at.first_feature();
    for (int v = 0; v < V; ++v) {
      shift[v] = at.is_in() ? s.shift()[f] : 0.;
      f = at.next_feature(f);
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

// Where the thread's first vector is, and how far apart its vectors are.
template <typename T>
struct Walk {
  T* data;
  int64_t step;

  __device__ Walk(const Matrix& m, const Place& at) {
    const int64_t row_stride = at.key->plan.group * m.row_stride;
    data = static_cast<T*>(m.data) + (at.begin + at.row) * row_stride + at.first_lane +
           at.lane;
    step = row_stride << at.rows_shift;
  }
  __device__ Vector<T>* operator[](int i) const {
    return reinterpret_cast<Vector<T>*>(data + i * step);
  }
};

__device__ inline int64_t row_of(const Place& at, int i) {
  return at.begin + at.row + (static_cast<int64_t>(i) << at.rows_shift);
}

// How many rows of its lanes the thread has.
__device__ inline int rows_of(const Place& at) {
  const int rows = at.rows - at.row;
  return at.is_in() && rows > 0 ? (rows + at.rows_apart() - 1) >> at.rows_shift : 0;
}

template <int kValue>
struct Constant {
  __device__ operator int() const { return kValue; }
};

// Calls step(i, size) for rows i … i + size - 1 of n: whole batches, whose size is
// known when they are compiled, so that addresses are counted on; then what is left.
template <int kBatch, typename Step>
__device__ __forceinline__ void in_batches(int n, Step step) {
  int i = 0;
#pragma unroll 1
  for (; i + kBatch <= n; i += kBatch) {
    step(i, Constant<kBatch>());
  }
  if (i < n) {
    step(i, n - i);
  }
}

// Which of the thread's rows `first` … first + K - 1 the mask lets count, a bit each,
// and how many of all that were asked for.
struct Marks {
  int taken = 0;

  template <int K>
  __device__ __forceinline__ unsigned take(const Place& at, int first, int n) {
    const bool* const mask = at.key->key.mask;
    if (mask == nullptr) {
      return ~0u;
    }
    bool marks[K];
#pragma unroll
    for (int j = 0; j < K; ++j) {
      marks[j] = first + j < n && mask[row_of(at, first + j)];
    }
    unsigned bits = 0;
#pragma unroll
    for (int j = 0; j < K; ++j) {
      taken += marks[j];
      bits |= static_cast<unsigned>(marks[j]) << j;
    }
    return bits;
  }

  // The samples of the block's rows that count, and the tail's.
  __device__ double samples(const Shared& s, const Place& at) const {
    const Key& key = at.key->key;
    double rows = at.rows > 0 ? at.rows : 0;
    if (key.mask != nullptr) {
      s.scratch()[threadIdx.x] = at.lane == 0 ? taken : 0;
      __syncthreads();
      sum_rows(s.scratch(), 1, 0, static_cast<int>(blockDim.x), 1);
      rows = s.scratch()[0];
      __syncthreads();
    }
    const int64_t tail = at.has_tail() ? key.samples - at.tail() : 0;
    return rows * at.key->plan.group + static_cast<double>(tail);
  }
};

// The thread's rows, one value of any type and stride at a time, in the arithmetic of
// C.
template <typename C, typename Sums>
__device__ __forceinline__ void sum_values(const Place& at, Sums* sums, Marks* marks) {
  using Summed = std::conditional_t<std::is_same_v<C, float>,
                                    ColumnOf<uint32_t, kSummedAtOnce>, Column>;
  constexpr int K = Summed::size;
  const Matrix& x = at.key->key.x;
  const int n = rows_of(at);
  const int64_t step = x.row_stride << at.rows_shift;
  int64_t from = row_of(at, 0) * x.row_stride +
                 static_cast<int64_t>(at.first_lane + at.lane) * x.feature_stride;
#pragma unroll 1
  for (int i = 0; i < n; i += K) {
    Summed column;
    column.load_from(x, from, step, n - i);
    const unsigned counts = marks->take<K>(at, i, n);
    C values[K];
    column.convert(x.dtype, values);
#pragma unroll
    for (int j = 0; j < K; ++j) {
      if (i + j < n && (counts >> j & 1) != 0) {
        sums->add_one(0, values[j]);
      }
    }
    sums->flush();
    from += K * step;
  }
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

// The thread's rows in double, for what float cannot sum: a few lanes at a time, since
// others need their registers.
template <typename T>
__device__ __forceinline__ void sum_again(const Shared& s, const Place& at) {
  constexpr int V = Vector<T>::size;
  constexpr int kLanes = 2;
  constexpr int kAtOnce = 4;
  const Walk<T> x(at.key->key.x, at);
  const int n = rows_of(at);
  int used[V];
  double d1[kLanes];
  double d2[kLanes];
  const auto sum_lanes = [&](int first) {
    float shift[kLanes];
    int f = at.first_feature();
    for (int v = 0; v < first + kLanes; ++v) {
      if (v >= first) {
        shift[v - first] = at.is_in() ? static_cast<float>(s.shift()[f]) : 0.f;
      }
      f = at.next_feature(f);
    }
    for (int v = 0; v < kLanes; ++v) {
      used[first + v] = 0;
      d1[v] = 0;
      d2[v] = 0;
    }
    const auto add = [&](int v, T value) {
      const double wide = load<double>(value);
      const bool is_usable = usable(wide);
      const double d = is_usable ? wide - shift[v] : 0.;
      used[first + v] += is_usable;
      d1[v] += d;
      d2[v] += d * d;
    };
    Marks marks;
#pragma unroll 1
    for (int i = 0; i < n; i += kAtOnce) {
      Vector<T> batch[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        if (i + j < n) {
          batch[j] = *x[i + j];
        }
      }
      const unsigned counts = marks.take<kAtOnce>(at, i, n);
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        if (i + j < n && (counts >> j & 1) != 0) {
#pragma unroll
          for (int v = 0; v < kLanes; ++v) {
            add(v, batch[j].at[first + v]);
          }
        }
      }
    }
    add_tail<T>(at, [&](int lane, T value) {
      if (lane >= first && lane < first + kLanes) {
        add(lane - first, value);
      }
    });
  };
  sum_block<2, V>(s, at, {1, 2}, V, [&](int v, double (&values)[2]) {
    if (v % kLanes == 0) {
      sum_lanes(v);
    }
    values[0] = d1[v % kLanes];
    values[1] = d2[v % kLanes];
  });
  sum_block<1, V>(s, at, {0}, V,
                  [&](int v, double (&values)[1]) { values[0] = used[v]; });
}

// Brings what the threads have summed into s.mine(); again() does so, if float sums
// cannot be trusted.
template <int V, typename Again>
__device__ __forceinline__ void sum_up(const Params& p, const Shared& s,
                                       const Place& at, const FloatSums<V>& sums,
                                       const Marks& marks, Again again) {
  const int n = at.features;
  const double samples = marks.samples(s, at);
  sum_block<2, V>(s, at, {1, 2}, V, [&](int v, double (&values)[2]) {
    values[0] = sums.d1[v];
    values[1] = sums.d2[v];
  });
  bool bad = false;
  for (int f = static_cast<int>(threadIdx.x); f < n; f += blockDim.x) {
    const double used = Moments::used_of(s.old()[5 * n], s.old()[2 * n + f]);
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
    again();
  }
}

template <int V, typename Again>
__device__ __forceinline__ void sum_up(const Params&, const Shared& s, const Place& at,
                                       const DoubleSums<V>& sums, const Marks& marks,
                                       Again) {
  const double samples = marks.samples(s, at);
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

// All of this for a key without vectors.
__device__ __forceinline__ void sum_up_values(const Params& p, const Shared& s,
                                              const Place& at) {
  bool in_double = !fits_float(at.key->key.x.dtype);
  if (!in_double) {
    Marks marks;
    FloatSums<1> sums(s, at);
    sum_values<float>(at, &sums, &marks);
    sum_up(p, s, at, sums, marks, [&] { in_double = true; });
  }
  if (in_double) {
    Marks marks;
    DoubleSums<1> sums(s, at);
    sum_values<double>(at, &sums, &marks);
    sum_up(p, s, at, sums, marks, [] {});
  }
}

// Adds up what the blocks of a slab have found: find(chunk, i) for each value i. The
// threads that share a value each take every so-many-th chunk, kAtOnce of them under
// way.
template <int kAtOnce, typename Find>
__device__ void sum_chunks(const Shared& s, const Place& at, Find find) {
  const int values = 3 * at.features + 1;
  const int chunks = at.key->plan.chunks;
  const int thread = static_cast<int>(threadIdx.x);
  int shift = 0;
  while (1 << shift < values && 1 << shift < static_cast<int>(blockDim.x)) {
    ++shift;
  }
  const int width = 1 << shift;
  const int apart = static_cast<int>(blockDim.x) >> shift;
  for (int base = 0; base < values; base += width) {
    const int i = base + (thread & (width - 1));
    double sum = 0;
    if (i < values) {
#pragma unroll 1
      for (int c = thread >> shift; c < chunks; c += kAtOnce * apart) {
        double found[kAtOnce];
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
          found[j] = c + j * apart < chunks ? find(c + j * apart, i) : 0.;
        }
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
          sum += found[j];
        }
      }
    }
    __syncthreads();
    s.scratch()[thread] = sum;
    __syncthreads();
    sum_rows(s.scratch(), 1, 0, apart, width);
    if (thread < width && i < values) {
      s.total()[i] = s.scratch()[thread];
    }
  }
  __syncthreads();
}

// The top bit of a counter: the resident kernel's barrier flips it.
constexpr unsigned kPhase = 0x80000000u;

// Whether the caller is the last of `all` to come here. What the others wrote before
// they came can be read after it.
__device__ inline bool comes_last(unsigned* counter, unsigned all) {
  const bool last = (fetch_add(counter, 1u) & ~kPhase) == all - 1;
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
// It is kept for write_features() and write_count().
__device__ inline Moments fold_feature(const Params& p, const Shared& s,
                                       const Place& at, int f) {
  const int n = at.features;
  const State& to = at.key->key.state;
  const Partial sum{s.total()[f], s.total()[n + f], s.total()[2 * n + f]};
  Moments state;
  state.sum = s.old()[f];
  state.ssq = s.old()[n + f];
  state.missing = s.old()[2 * n + f];
  state.var = s.old()[3 * n + f];
  state.count = s.old()[5 * n];
  state.weigh();
  Moments batch = unshift(sum, s.shift()[f], s.total()[3 * n]);
  const double left_out = batch.missing;
  if (to.nonfinite.data == nullptr) {
    batch = impute(batch, state);
  }
  const Moments folded = rounded(to, fold(state, batch, p.weights));
  s.old()[f] = folded.sum;
  s.old()[n + f] = folded.ssq;
  s.old()[2 * n + f] = folded.missing;
  s.old()[3 * n + f] = folded.var;
  s.old()[4 * n + f] += left_out;
  if (f == 0) {
    *s.count() = folded.count;
  }
  return folded;
}

// Writes the state of the slab's features as folded, but for the count, which other
// slabs may not have read yet. Each thread writes what it has folded itself.
__device__ inline void write_features(const Shared& s, const Place& at) {
  const int n = at.features;
  if (!(s.total()[3 * n] > 0)) {
    return;  // no samples: nothing has changed
  }
  const State& to = at.key->key.state;
  for (int i = static_cast<int>(threadIdx.x); i < n; i += blockDim.x) {
    const int64_t f = at.feature(i);
    to.sum.write(f, s.old()[i]);
    to.ssq.write(f, s.old()[n + i]);
    if (to.nonfinite.data != nullptr) {
      to.nonfinite.write(f, s.old()[2 * n + i]);
      to.nonfinite.write(at.key->key.features + f, s.old()[4 * n + i]);
    }
    if (to.central.data != nullptr) {
      to.central.write(f, s.old()[3 * n + i]);
    }
  }
}

// Says, for a slab, that all its blocks have the count that they read in shared memory:
// nothing has to be ordered for that. Returns how many slabs have said so before.
__device__ inline unsigned give_up_count(const Place& at) {
  const int slabs = at.key->plan.slabs;
  return slabs == 1 ? 0 : fetch_add_relaxed(at.key->counters + slabs, 1u) & ~kPhase;
}

// The last slab to give it up writes the count.
__device__ inline void write_count(const Shared& s, const Place& at, unsigned before) {
  const int slabs = at.key->plan.slabs;
  if (before != static_cast<unsigned>(slabs - 1)) {
    return;
  }
  if (slabs > 1) {
    at.key->counters[slabs] = 0;
  }
  if (s.total()[3 * at.features] > 0) {
    at.key->key.state.write_count(*s.count(), s.total()[3 * at.features]);
  }
}

// --------------------------------------------------------------------------- output

// The coefficients of the slab's features, as three arrays.
template <template <typename> class Map, typename C>
__device__ void set_map(double* maps, const Place& at, int f, const Moments& state,
                        const Rule& rule) {
  C* to = reinterpret_cast<C*>(maps);
  const auto [a, b, c] =
      Map<C>::of(statistic(state, rule.scaling, at.key->key.state.rounding()));
  to[f] = a;
  to[at.features + f] = b;
  to[2 * at.features + f] = c;
}

template <template <typename> class Map, typename C>
__device__ Map<C> get_map(const double* maps, const Place& at, int f) {
  const C* from = reinterpret_cast<const C*>(maps);
  return {from[f], from[at.features + f], from[2 * at.features + f]};
}

// Those of the thread's lanes.
template <template <typename> class Map, typename C, int V>
__device__ void get_maps(const double* maps, const Place& at, Map<C> (&map)[V]) {
  if (at.is_in()) {
    int f = at.first_feature();
    for (int v = 0; v < V; ++v) {
      map[v] = get_map<Map, C>(maps, at, f);
      f = at.next_feature(f);
    }
  }
}

// `from` is a copy, so that it is loaded at once: `to` may be where it came from.
template <typename T, typename M, int V>
__device__ void store_mapped(const Params& p, Vector<Output<T>>* to,
                             const Vector<T> from, const M (&map)[V]) {
  using C = typename Compute<T>::type;
  const C limit = p.rule.limit<C>();
  Vector<Output<T>> out;
  if constexpr (sizeof(T) == 2) {
    uint32_t pairs[V / 2];
    for (int v = 0; v < V; v += 2) {
      pairs[v / 2] = T::round_pair(map[v](load<C>(from.at[v]), limit),
                                   map[v + 1](load<C>(from.at[v + 1]), limit));
    }
    std::memcpy(&out, pairs, sizeof(out));
  } else {
    for (int v = 0; v < V; ++v) {
      out.at[v] = store<Output<T>>(map[v](load<C>(from.at[v]), limit));
    }
  }
  store_streaming(to, out);
}

// The arithmetic of the outputs of a key without vectors: what its vectors would have.
__device__ inline bool maps_in_float(const Key& key) {
  return fits_float(key.x.dtype) && key.y.dtype != Dtype::kFloat64;
}

// The block's values, one at a time.
template <template <typename> class Map, typename C>
__device__ __forceinline__ void map_values(const Params& p, const double* maps,
                                           const Place& at) {
  if (!at.is_in()) {
    return;
  }
  const Key& key = at.key->key;
  const auto map = get_map<Map, C>(maps, at, at.first_feature());
  const C limit = p.rule.limit<C>();
  const int n = rows_of(at);
  const int64_t f = at.first_lane + at.lane;
  const int64_t x_step = key.x.row_stride << at.rows_shift;
  const int64_t y_step = key.y.row_stride << at.rows_shift;
  int64_t x = row_of(at, 0) * key.x.row_stride + f * key.x.feature_stride;
  int64_t y = row_of(at, 0) * key.y.row_stride + f * key.y.feature_stride;
#pragma unroll 1
  for (int i = 0; i < n; i += kValuesAtOnce) {
    Column column;
    column.load_from(key.x, x, x_step, n - i);
    C values[kValuesAtOnce];
    column.convert(key.x.dtype, values);
    dispatch_float(key.y.dtype, [&](auto type) {
      using T = typename decltype(type)::type;
#pragma unroll
      for (int j = 0; j < kValuesAtOnce; ++j) {
        if (i + j < n) {
          static_cast<T*>(key.y.data)[y + j * y_step] = store<T>(map(values[j], limit));
        }
      }
    });
    x += kValuesAtOnce * x_step;
    y += kValuesAtOnce * y_step;
  }
}

// The samples of the tail.
template <template <typename> class Map, typename C>
__device__ void map_tail(const Params& p, const double* maps, const Place& at) {
  const Key& key = at.key->key;
  const int64_t values = (key.samples - at.tail()) * key.features;
#pragma unroll 1
  for (int64_t i = threadIdx.x; i < values; i += blockDim.x) {
    const int64_t r = at.tail() + i / key.features;
    const int64_t f = i % key.features;
    const auto map = get_map<Map, C>(maps, at, static_cast<int>(f));
    const C value = static_cast<C>(load_any(key.x, r, f));
    store_any(key.y, r, f, map(value, p.rule.limit<C>()));
  }
}

}  // namespace cuda
}  // namespace vecnorm
