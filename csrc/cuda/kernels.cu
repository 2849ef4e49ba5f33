// Copyright (c) the torchrl_vecnorm authors.
//
// This source code is licensed under the MIT license found in the
// LICENSE file in the root directory of this source tree.

// The CUDA kernels.
//
// update() is two launches for all keys:
//
//   accumulate  a block sums d and d² of its rows and lanes around the key's shift, in
//               float within a thread, flushed to double, and in double from the block
//               on; sums that cannot be trusted (moments.h) are taken again in double.
//               The last block of a slab to finish combines the partial sums of all of
//               them in order, and folds them into the state; the last slab of a key
//               writes its count, which the others have read by then.
//   apply       y = (x - loc) / scale, in the opposite order: what accumulate read last
//               may still be in the L2 cache.
//
// Nothing depends on the order in which blocks run: integer counters say who is last,
// sums are added in the order of the plan.

#include "../plan.h"
#include "kernels.h"

namespace vecnorm {
namespace cuda {
namespace {

// Keys of one launch: their parameters must fit into the 4 KB of a kernel's arguments.
constexpr int kMaxKeys = 16;
// Rows that a thread sums in float before it flushes to double.
constexpr int kFlushRows = 64;

struct DeviceKey {
  Key key;
  LanePlan sums;
  LanePlan maps;
  double* partials;    // [chunks][3][lanes]: n, d1, d2; then samples_in [chunks][slabs]
  unsigned* counters;  // [slabs], then one for the key

  VECNORM_HD double* samples_in() const {
    return partials + static_cast<int64_t>(sums.chunks) * 3 * sums.lanes;
  }
};

struct Params {
  DeviceKey keys[kMaxKeys];
  int ends[kMaxKeys];  // the blocks of keys 0 … i
  int size;
  Weights weights;
  double eps;
};
static_assert(sizeof(Params) <= 4096, "kernel arguments are limited to 4 KB");

// 16 bytes, loaded at once.
template <typename T>
struct alignas(16) Vector {
  static constexpr int size = 16 / sizeof(T);
  T at[size];
};

// ----------------------------------------------------------------------- one value

__device__ double load_any(const Matrix& m, int64_t row, int64_t feature) {
  const int64_t i = row * m.row_stride + feature * m.feature_stride;
  double value = 0;
  dispatch_any(m.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    value = load<double>(static_cast<const T*>(m.data)[i]);
  });
  return value;
}

__device__ void store_any(const Matrix& m, int64_t row, int64_t feature, double value) {
  const int64_t i = row * m.row_stride + feature * m.feature_stride;
  dispatch_float(m.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    static_cast<T*>(m.data)[i] = store<T>(value);
  });
}

// ----------------------------------------------------------------------- the state

__device__ double read(const void* data, Dtype dtype, int64_t i) {
  return dtype == Dtype::kFloat64
             ? static_cast<const double*>(data)[i]
             : static_cast<double>(static_cast<const float*>(data)[i]);
}

__device__ void write(void* data, Dtype dtype, int64_t i, double value) {
  if (dtype == Dtype::kFloat64) {
    static_cast<double*>(data)[i] = value;
  } else {
    static_cast<float*>(data)[i] = static_cast<float>(value);
  }
}

__device__ Moments read_state(const State& s, int64_t f) {
  Moments m;
  m.sum = read(s.sum, s.sum_dtype, f);
  m.ssq = read(s.ssq, s.ssq_dtype, f);
  m.count = read(s.count, s.count_dtype, 0);
  m.missing = s.nonfinite != nullptr ? s.nonfinite[f] : 0.;
  return m;
}

// The running mean, or the first sample while there is none.
__device__ double shift_of(const Key& key, int64_t f) {
  const Moments state = read_state(key.state, f);
  double shift = state.used() > 0 ? state.sum / state.used() : load_any(key.x, 0, f);
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
  int width;   // lanes of the slab
  int stride;  // lanes that the threads of a row cover: width or more
  int lane;    // the thread's first one, within the slab
  int row;     // the thread's first one, within the chunk
  int rows_apart;
  int64_t begin;  // rows of the chunk
  int64_t end;
};

__device__ Place find_place(const Params& p, int block, bool maps) {
  int k = 0;
  while (block >= p.ends[k]) {
    ++k;
  }
  const int piece = block - (k > 0 ? p.ends[k - 1] : 0);
  Place at;
  at.key = &p.keys[k];
  const LanePlan& plan = maps ? at.key->maps : at.key->sums;
  at.chunk = piece / plan.slabs;
  at.slab = piece % plan.slabs;
  at.first_lane = at.slab * kSlabLanes;
  at.width = plan.lanes - at.first_lane;
  if (at.width > kSlabLanes) {
    at.width = kSlabLanes;
  }
  at.stride = plan.columns * plan.vector;
  at.lane = static_cast<int>(threadIdx.x) % plan.columns * plan.vector;
  at.row = static_cast<int>(threadIdx.x) / plan.columns;
  at.rows_apart = static_cast<int>(blockDim.x) / plan.columns;
  at.begin = at.chunk * plan.rows_per_chunk;
  at.end = at.begin + plan.rows_per_chunk;
  if (at.end > plan.rows) {
    at.end = plan.rows;
  }
  return at;
}

// ---------------------------------------------------------------------- accumulate

// What a block shares. One quantity is summed over the rows of the block at a time.
struct Shared {
  double shift[kSlabLanes];
  double sums[3][kSlabLanes];
  double rows[kBlockThreads * 8];
  bool last;
};

// Adds up what the threads of each lane have, in the order of their rows.
template <int V>
__device__ void sum_block(Shared& s, const Place& at, const double (&values)[V],
                          int quantity) {
  __syncthreads();
  if (at.lane < at.width) {
    for (int v = 0; v < V; ++v) {
      s.rows[at.row * at.stride + at.lane + v] = values[v];
    }
  }
  __syncthreads();
  const int lane = static_cast<int>(threadIdx.x);
  if (lane < at.width) {
    double sum = 0;
    for (int r = 0; r < at.rows_apart; ++r) {
      sum += s.rows[r * at.stride + lane];
    }
    s.sums[quantity][lane] = sum;
  }
}

template <typename T>
struct Loader {
  static constexpr int size = Vector<T>::size;

  template <typename C>
  static __device__ void load(const Place& at, const LanePlan& plan, int64_t row,
                              C (&values)[size]) {
    const Matrix& x = at.key->key.x;
    const T* data = static_cast<const T*>(x.data) + row * plan.group * x.row_stride +
                    at.first_lane + at.lane;
    const Vector<T> vector = *reinterpret_cast<const Vector<T>*>(data);
    for (int v = 0; v < size; ++v) {
      values[v] = vecnorm::load<C>(vector.at[v]);
    }
  }
};

// Any type, any strides: one value at a time, as double.
struct AnyLoader {
  static constexpr int size = 1;

  template <typename C>
  static __device__ void load(const Place& at, const LanePlan&, int64_t row,
                              C (&values)[1]) {
    values[0] = static_cast<C>(load_any(at.key->key.x, row, at.first_lane + at.lane));
  }
};

__device__ bool counts(const Key& key, int64_t row) {
  return key.mask == nullptr || key.mask[row];
}

template <typename From>
__device__ void sum_in_double(Shared& s, const Place& at) {
  constexpr int V = From::size;
  const LanePlan& plan = at.key->sums;
  double n[V] = {};
  double d1[V] = {};
  double d2[V] = {};
  if (at.lane < at.width) {
    for (int64_t r = at.begin + at.row; r < at.end; r += at.rows_apart) {
      if (counts(at.key->key, r)) {
        double x[V];
        From::load(at, plan, r, x);
        for (int v = 0; v < V; ++v) {
          const Partial p = reduce({n[v], d1[v], d2[v]}, x[v], s.shift[at.lane + v]);
          n[v] = p.n;
          d1[v] = p.d1;
          d2[v] = p.d2;
        }
      }
    }
  }
  sum_block<V>(s, at, n, 0);
  sum_block<V>(s, at, d1, 1);
  sum_block<V>(s, at, d2, 2);
}

template <typename From>
__device__ void sum_in_float(Shared& s, const Place& at) {
  constexpr int V = From::size;
  const LanePlan& plan = at.key->sums;
  double n[V] = {};
  double d1[V] = {};
  double d2[V] = {};
  if (at.lane < at.width) {
    float shift[V];
    for (int v = 0; v < V; ++v) {
      shift[v] = static_cast<float>(s.shift[at.lane + v]);
    }
    int64_t r = at.begin + at.row;
    while (r < at.end) {
      float s1[V] = {};
      float s2[V] = {};
      int counted = 0;
      for (int i = 0; i < kFlushRows && r < at.end; ++i, r += at.rows_apart) {
        if (counts(at.key->key, r)) {
          float x[V];
          From::load(at, plan, r, x);
          for (int v = 0; v < V; ++v) {
            const float d = x[v] - shift[v];
            s1[v] += d;
            s2[v] += d * d;
          }
          ++counted;
        }
      }
      for (int v = 0; v < V; ++v) {
        n[v] += counted;
        d1[v] += s1[v];
        d2[v] += s2[v];
      }
    }
  }
  sum_block<V>(s, at, n, 0);
  sum_block<V>(s, at, d1, 1);
  sum_block<V>(s, at, d2, 2);
  bool bad = false;
  const int lane = static_cast<int>(threadIdx.x);
  if (lane < at.width) {
    bad = !trustworthy(s.sums[0][lane], s.sums[1][lane], s.sums[2][lane]);
  }
  if (__syncthreads_or(bad)) {
    sum_in_double<From>(s, at);
  }
}

__device__ void sum_piece(Shared& s, const Place& at) {
  if (at.key->sums.vector == 1) {
    return sum_in_double<AnyLoader>(s, at);
  }
  switch (at.key->key.x.dtype) {
    case Dtype::kFloat64:
      return sum_in_double<Loader<double>>(s, at);
    case Dtype::kFloat16:
      return sum_in_float<Loader<Float16>>(s, at);
    case Dtype::kBFloat16:
      return sum_in_float<Loader<BFloat16>>(s, at);
    default:
      return sum_in_float<Loader<float>>(s, at);
  }
}

// How many rows of the block's chunk count.
__device__ int64_t count_rows(const Place& at) {
  const Key& key = at.key->key;
  if (key.mask == nullptr) {
    return at.end - at.begin;
  }
  int64_t rows = 0;
  for (int64_t r = at.begin; r < at.end; r += blockDim.x) {
    const int64_t mine = r + static_cast<int>(threadIdx.x);
    rows += __syncthreads_count(mine < at.end && key.mask[mine]);
  }
  return rows;
}

// How many samples count, as the blocks of a slab have found.
__device__ double samples_of(const DeviceKey& k, int slab) {
  double samples = 0;
  for (int c = 0; c < k.sums.chunks; ++c) {
    samples += k.samples_in()[c * k.sums.slabs + slab];
  }
  return samples + static_cast<double>(k.key.samples - k.sums.rows * k.sums.group);
}

// Combines the partials of some features and folds them into the state. Several
// threads share a feature, each with every so-many-th partial.
__device__ void finish(Shared& s, const Params& p, const DeviceKey& k, double samples,
                       int64_t first, int64_t last) {
  const LanePlan& plan = k.sums;
  const int64_t features = k.key.features;
  int per_round = 1;
  while (per_round < last - first && per_round < kSlabLanes) {
    per_round *= 2;
  }
  const int threads = static_cast<int>(blockDim.x) / per_round;
  const int mine = static_cast<int>(threadIdx.x) / per_round;
  const int64_t items = static_cast<int64_t>(plan.chunks) * plan.group;
  for (int64_t base = first; base < last; base += per_round) {
    const int64_t f = base + static_cast<int>(threadIdx.x) % per_round;
    Partial sum;
    if (f < last) {
      for (int64_t i = mine; i < items; i += threads) {
        const double* part = k.partials + i / plan.group * 3 * plan.lanes +
                             i % plan.group * features + f;
        sum = combine(sum, {part[0], part[plan.lanes], part[2 * plan.lanes]});
      }
    }
    __syncthreads();
    double* mailbox = s.rows + 3 * static_cast<int>(threadIdx.x);
    mailbox[0] = sum.n;
    mailbox[1] = sum.d1;
    mailbox[2] = sum.d2;
    __syncthreads();
    if (mine == 0 && f < last) {
      for (int t = 1; t < threads; ++t) {
        const double* other =
            s.rows + 3 * (t * per_round + static_cast<int>(threadIdx.x));
        sum = combine(sum, {other[0], other[1], other[2]});
      }
      const double shift = shift_of(k.key, f);
      for (int64_t r = plan.rows * plan.group; r < k.key.samples; ++r) {
        sum = reduce(sum, load_any(k.key.x, r, f), shift);
      }
      Moments batch = unshift(sum, shift, samples);
      const double left_out = batch.missing;
      Moments state = read_state(k.key.state, f);
      if (k.key.state.nonfinite == nullptr) {
        batch = impute(batch, state);
      }
      if (samples > 0) {
        state = fold(state, batch, p.weights);
        write(k.key.state.sum, k.key.state.sum_dtype, f, state.sum);
        write(k.key.state.ssq, k.key.state.ssq_dtype, f, state.ssq);
        if (k.key.state.nonfinite != nullptr) {
          k.key.state.nonfinite[f] = state.missing;
          k.key.state.nonfinite[features + f] += left_out;
        }
      }
    }
  }
}

__device__ void finish_count(const Params& p, const DeviceKey& k, double samples) {
  Moments batch;
  batch.count = samples;
  Moments state;
  state.count = read(k.key.state.count, k.key.state.count_dtype, 0);
  write(k.key.state.count, k.key.state.count_dtype, 0,
        fold(state, batch, p.weights).count);
}

// Whether this block is the last one to come here, of `all`. What the others wrote
// before they came can be read after it.
__device__ bool comes_last(Shared& s, unsigned* counter, unsigned all) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    s.last = atomicAdd(counter, 1u) == all - 1;
    if (s.last) {
      *counter = 0;
    }
  }
  __syncthreads();
  __threadfence();
  return s.last;
}

__global__ void __launch_bounds__(kBlockThreads)
    accumulate_kernel(const __grid_constant__ Params p) {
  __shared__ Shared s;
  const Place at = find_place(p, static_cast<int>(blockIdx.x), false);
  const DeviceKey& k = *at.key;
  const LanePlan& plan = k.sums;
  const int lane = static_cast<int>(threadIdx.x);
  if (lane < at.width) {
    s.shift[lane] = shift_of(k.key, (at.first_lane + lane) % k.key.features);
  }
  __syncthreads();
  sum_piece(s, at);
  __syncthreads();
  if (lane < at.width) {
    double* part = k.partials + static_cast<int64_t>(at.chunk) * 3 * plan.lanes +
                   at.first_lane + lane;
    for (int q = 0; q < 3; ++q) {
      part[q * plan.lanes] = s.sums[q][lane];
    }
  }
  const int64_t rows = count_rows(at);
  if (threadIdx.x == 0) {
    k.samples_in()[at.chunk * plan.slabs + at.slab] =
        static_cast<double>(rows * plan.group);
  }
  // Where rows are grouped, the lanes of a feature lie in several slabs, and the last
  // block finishes the key; else the last block of each slab finishes that.
  const bool grouped = plan.group > 1;
  const unsigned blocks = static_cast<unsigned>(plan.chunks);
  const unsigned slabs = static_cast<unsigned>(plan.slabs);
  unsigned* const counter = k.counters + (grouped ? 0 : at.slab);
  if (!comes_last(s, counter, grouped ? blocks * slabs : blocks)) {
    return;
  }
  const double samples = samples_of(k, at.slab);
  const int64_t first = grouped ? 0 : at.first_lane;
  finish(s, p, k, samples, first, grouped ? k.key.features : first + at.width);
  __syncthreads();  // every thread has read the old count
  if ((grouped || comes_last(s, k.counters + slabs, slabs)) && threadIdx.x == 0) {
    finish_count(p, k, samples);
  }
}

// --------------------------------------------------------------------------- apply

// The coefficients of the lanes of a slab, as arrays.
template <typename C>
struct Coefficients {
  C a[kSlabLanes];
  C b[kSlabLanes];
  C c[kSlabLanes];
};

template <template <typename> class Map, typename C>
__device__ void prepare(Coefficients<C>& s, const Params& p, const Place& at) {
  const int lane = static_cast<int>(threadIdx.x);
  if (lane < at.width) {
    const Key& key = at.key->key;
    const int64_t f = (at.first_lane + lane) % key.features;
    const auto [a, b, c] = Map<C>::of(statistic(read_state(key.state, f), p.eps));
    s.a[lane] = a;
    s.b[lane] = b;
    s.c[lane] = c;
  }
  __syncthreads();
}

template <template <typename> class Map, typename T>
__device__ void apply_vectors(Coefficients<typename Compute<T>::type>& s,
                              const Params& p, const Place& at) {
  using C = typename Compute<T>::type;
  constexpr int V = Vector<T>::size;
  prepare<Map, C>(s, p, at);
  if (at.lane >= at.width) {
    return;
  }
  const LanePlan& plan = at.key->maps;
  const Matrix& y = at.key->key.y;
  Map<C> map[V];
  for (int v = 0; v < V; ++v) {
    map[v] = {s.a[at.lane + v], s.b[at.lane + v], s.c[at.lane + v]};
  }
  T* out = static_cast<T*>(y.data) + at.first_lane + at.lane;
  for (int64_t r = at.begin + at.row; r < at.end; r += at.rows_apart) {
    C x[V];
    Loader<T>::load(at, plan, r, x);
    Vector<T> vector;
    for (int v = 0; v < V; ++v) {
      vector.at[v] = store<T>(map[v](x[v]));
    }
    store_streaming(reinterpret_cast<Vector<T>*>(out + r * plan.group * y.row_stride),
                    vector);
  }
}

// Rows from `begin` on, one value at a time.
template <template <typename> class Map>
__device__ void apply_values(const Params& p, const Key& key, int64_t begin,
                             int64_t end, int64_t first, int64_t width) {
  const int64_t values = (end - begin) * width;
  for (int64_t i = threadIdx.x; i < values; i += blockDim.x) {
    const int64_t r = begin + i / width;
    const int64_t f = first + i % width;
    const auto map = Map<double>::of(statistic(read_state(key.state, f), p.eps));
    store_any(key.y, r, f, map(load_any(key.x, r, f)));
  }
}

template <template <typename> class Map>
__device__ void apply_piece(const Params& p, int block) {
  __shared__ Coefficients<float> in_float;
  __shared__ Coefficients<double> in_double;
  const Place at = find_place(p, block, true);
  const Key& key = at.key->key;
  const LanePlan& plan = at.key->maps;
  if (plan.vector == 1) {
    prepare<Map, double>(in_double, p, at);
    for (int64_t r = at.begin + at.row; r < at.end; r += at.rows_apart) {
      if (at.lane < at.width) {
        const Map<double> map{in_double.a[at.lane], in_double.b[at.lane],
                              in_double.c[at.lane]};
        const int64_t f = at.first_lane + at.lane;
        store_any(key.y, r, f, map(load_any(key.x, r, f)));
      }
    }
    return;
  }
  switch (key.x.dtype) {
    case Dtype::kFloat64:
      apply_vectors<Map, double>(in_double, p, at);
      break;
    case Dtype::kFloat16:
      apply_vectors<Map, Float16>(in_float, p, at);
      break;
    case Dtype::kBFloat16:
      apply_vectors<Map, BFloat16>(in_float, p, at);
      break;
    default:
      apply_vectors<Map, float>(in_float, p, at);
  }
  if (at.slab == 0 && at.chunk == plan.chunks - 1) {
    apply_values<Map>(p, key, plan.rows * plan.group, key.samples, 0, key.features);
  }
}

__global__ void __launch_bounds__(kBlockThreads)
    normalize_kernel(const __grid_constant__ Params p) {
  apply_piece<Affine>(p, static_cast<int>(gridDim.x - 1 - blockIdx.x));
}

__global__ void __launch_bounds__(kBlockThreads)
    denormalize_kernel(const __grid_constant__ Params p) {
  apply_piece<InverseAffine>(p, static_cast<int>(gridDim.x - 1 - blockIdx.x));
}

// ---------------------------------------------------------------------------- host

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

bool aligned(const Matrix& m) {
  return m.feature_stride == 1 && reinterpret_cast<uintptr_t>(m.data) % 16 == 0 &&
         m.row_stride * size_of(m.dtype) % 16 == 0;
}

bool dense(const Matrix& m, int64_t features) {
  return m.feature_stride == 1 && m.row_stride == features &&
         reinterpret_cast<uintptr_t>(m.data) % 16 == 0;
}

LanePlan plan_sums(const Key& key) {
  const bool grouped = dense(key.x, key.features) && key.mask == nullptr;
  const bool wide = grouped || aligned(key.x);
  return make_lane_plan(key.samples, key.features, wide ? 16 / size_of(key.x.dtype) : 1,
                        grouped);
}

LanePlan plan_maps(const Key& key) {
  const bool same = key.x.dtype == key.y.dtype;
  const bool grouped = dense(key.x, key.features) && dense(key.y, key.features);
  const bool wide = grouped || (aligned(key.x) && aligned(key.y));
  return make_lane_plan(key.samples, key.features,
                        wide && same ? 16 / size_of(key.x.dtype) : 1, grouped);
}

WorkspaceSize workspace_of(const LanePlan& plan) {
  const size_t chunks = static_cast<size_t>(plan.chunks);
  const size_t slabs = static_cast<size_t>(plan.slabs);
  return {chunks * (3 * static_cast<size_t>(plan.lanes) + slabs), slabs + 1};
}

// Launches a kernel over the pieces of up to kMaxKeys keys at a time.
class Launcher {
 public:
  Launcher(void (*kernel)(Params), bool maps, Weights weights, double eps,
           Stream stream)
      : kernel_(kernel), maps_(maps), stream_(stream) {
    params_.size = 0;
    params_.weights = weights;
    params_.eps = eps;
  }

  cudaError_t add(const DeviceKey& key) {
    const LanePlan& plan = maps_ ? key.maps : key.sums;
    const int before = params_.size > 0 ? params_.ends[params_.size - 1] : 0;
    params_.keys[params_.size] = key;
    params_.ends[params_.size] = before + plan.chunks * plan.slabs;
    ++params_.size;
    return params_.size == kMaxKeys ? flush() : cudaSuccess;
  }

  cudaError_t flush() {
    if (params_.size == 0) {
      return cudaSuccess;
    }
    const int blocks = params_.ends[params_.size - 1];
    params_.size = 0;
    return launch(kernel_, blocks, kBlockThreads, stream_, params_);
  }

 private:
  void (*kernel_)(Params);
  bool maps_;
  Stream stream_;
  Params params_;
};

cudaError_t apply(void (*kernel)(Params), const std::vector<Key>& keys, double eps,
                  Stream stream) {
  Launcher launcher(kernel, true, {1., 1.}, eps, stream);
  for (const Key& key : keys) {
    if (key.samples > 0 && key.y.data != nullptr) {
      DeviceKey k{};
      k.key = key;
      k.maps = plan_maps(key);
      if (const cudaError_t error = launcher.add(k)) {
        return error;
      }
    }
  }
  return launcher.flush();
}

}  // namespace

WorkspaceSize workspace_size(const std::vector<Key>& keys) {
  WorkspaceSize all{0, 0};
  for (const Key& key : keys) {
    const WorkspaceSize size = workspace_of(plan_sums(key));
    all.partials += size.partials;
    all.counters += size.counters;
  }
  return all;
}

cudaError_t update(const std::vector<Key>& keys, Weights weights, double eps,
                   Workspace workspace, Stream stream) {
  Launcher launcher(accumulate_kernel, false, weights, eps, stream);
  for (const Key& key : keys) {
    if (key.samples > 0) {
      DeviceKey k{};
      k.key = key;
      k.sums = plan_sums(key);
      k.partials = workspace.partials;
      k.counters = workspace.counters;
      const WorkspaceSize size = workspace_of(k.sums);
      workspace.partials += size.partials;
      workspace.counters += size.counters;
      if (const cudaError_t error = launcher.add(k)) {
        return error;
      }
    }
  }
  if (const cudaError_t error = launcher.flush()) {
    return error;
  }
  return apply(normalize_kernel, keys, eps, stream);
}

cudaError_t normalize(const std::vector<Key>& keys, double eps, Stream stream) {
  return apply(normalize_kernel, keys, eps, stream);
}

cudaError_t denormalize(const std::vector<Key>& keys, double eps, Stream stream) {
  return apply(denormalize_kernel, keys, eps, stream);
}

}  // namespace cuda
}  // namespace vecnorm
