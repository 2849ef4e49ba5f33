// Copyright (c) the torchrl_vecnorm authors.
//
// This source code is licensed under the MIT license found in the
// LICENSE file in the root directory of this source tree.

// The CPU kernels. This file is compiled once for each instruction set, by isa_*.cpp,
// which define VECNORM_ISA (a namespace) and kPackBytes (the width of its registers).
//
// update() walks over the pieces of the plan three times, all keys together:
//
//   1. accumulate  every piece sums d and d² of its rows around the key's shift. Float
//                  inputs are summed in float, a few rows at a time, and flushed to
//                  double; sums that cannot be trusted (moments.h) are taken again in
//                  double. So the common case runs at the speed of float and the rare
//                  ones (NaN, overflow, a shift far off) cost a second look.
//   2. finish      the pieces of a feature are combined in order, folded into the state
//                  and projected to loc and scale.
//   3. apply       y = (x - loc) / scale, each thread going backwards over what it has
//                  just read, so that the newest values still come from its cache.
//
// Rows of few features are handled several at a time ("lanes"), so that inner loops are
// long enough for vector instructions.

namespace vecnorm {
namespace cpu {
namespace VECNORM_ISA {
namespace {

// Lanes of one inner loop where rows are shorter than that.
constexpr int64_t kLanes = 64;
// Floats of one register, and registers whose sums a loop keeps.
constexpr int64_t kPack = kPackBytes / sizeof(float);
constexpr int64_t kPacks = 4;
// Rows that are summed in float before they are flushed to double.
constexpr int64_t kFlushRows = 128;
// Calls with fewer values than that stay on the calling thread: waking the others takes
// longer.
constexpr int64_t kSerialValues = 32768;
// Fewer rows than that are summed in double at once: checking would cost as much.
constexpr int64_t kFewRows = 16;

// How many whole rows of `m` are taken as one.
int64_t group_of(const Matrix& m, int64_t features) {
  const bool dense = m.feature_stride == 1 && m.row_stride == features;
  return dense && 0 < features && features < kLanes ? kLanes / features : 1;
}

// ---------------------------------------------------------------------- the state

double read(const void* data, Dtype dtype, int64_t i) {
  return dtype == Dtype::kFloat64
             ? static_cast<const double*>(data)[i]
             : static_cast<double>(static_cast<const float*>(data)[i]);
}

void write(void* data, Dtype dtype, int64_t i, double value) {
  if (dtype == Dtype::kFloat64) {
    static_cast<double*>(data)[i] = value;
  } else {
    static_cast<float*>(data)[i] = static_cast<float>(value);
  }
}

Moments read_state(const State& s, int64_t f) {
  Moments m;
  m.sum = read(s.sum, s.sum_dtype, f);
  m.ssq = read(s.ssq, s.ssq_dtype, f);
  m.count = read(s.count, s.count_dtype, 0);
  m.missing = s.nonfinite != nullptr ? s.nonfinite[f] : 0.;
  return m;
}

void write_count(const State& s, double count) {
  write(s.count, s.count_dtype, 0, count);
}

// Writes all but `count`, which the features of a key share, and returns the moments
// as the state's own dtype holds them.
Moments write_state(const State& s, int64_t f, int64_t features, Moments m,
                    double left_out) {
  write(s.sum, s.sum_dtype, f, m.sum);
  write(s.ssq, s.ssq_dtype, f, m.ssq);
  m.sum = read(s.sum, s.sum_dtype, f);
  m.ssq = read(s.ssq, s.ssq_dtype, f);
  if (s.count_dtype == Dtype::kFloat32) {
    m.count = static_cast<float>(m.count);
  }
  if (s.nonfinite != nullptr) {
    s.nonfinite[f] = m.missing;
    s.nonfinite[features + f] += left_out;
  }
  return m;
}

// ----------------------------------------------------------------- the workspace

// What one key needs between the three walks. The arrays live in one block that the
// calling thread keeps.
struct Work {
  Plan plan;
  int64_t group = 1;               // rows taken as one when reading x
  bool is_anchored = true;         // every feature (moments.h)
  double* shift = nullptr;         // [features]
  double* partials = nullptr;      // [row_chunks][3][features]: n, d1, d2
  double* counted = nullptr;       // [row_chunks]
  Statistic* statistic = nullptr;  // [features]

  Partial partial(int64_t chunk, int64_t f) const {
    const double* p = partials + chunk * 3 * plan.features + f;
    return {p[0], p[plan.features], p[2 * plan.features]};
  }
};

std::vector<double>& workspace_block() {
  thread_local std::vector<double> block;
  return block;
}

double* workspace(size_t doubles) {
  std::vector<double>& block = workspace_block();
  if (block.size() < doubles) {
    block.resize(doubles);
  }
  return block.data();
}

// What a thread keeps from call to call is 8 MB at most.
void trim_workspace() {
  if (workspace_block().size() > (1 << 20)) {
    std::vector<double>().swap(workspace_block());
  }
}

struct Piece {
  int64_t key;
  int64_t chunk;
  int64_t block;
};

// The pieces of all keys, numbered through.
class Pieces {
 public:
  explicit Pieces(const std::vector<Work>& work) : work_(work) {
    ends_.reserve(work.size());
    for (const Work& w : work) {
      total_ += w.plan.pieces();
      ends_.push_back(total_);
    }
  }

  int64_t size() const { return total_; }

  Piece operator[](int64_t i) const {
    const int64_t key = std::upper_bound(ends_.begin(), ends_.end(), i) - ends_.begin();
    const Plan& plan = work_[key].plan;
    const int64_t at = i - (ends_[key] - plan.pieces());
    return {key, at / plan.feature_blocks, at % plan.feature_blocks};
  }

 private:
  const std::vector<Work>& work_;
  std::vector<int64_t> ends_;
  int64_t total_ = 0;
};

// ----------------------------------------------------------------- 1. accumulate

// Some rows and lanes of a matrix.
template <typename T>
struct Rows {
  T* data;
  int64_t row_stride;
  int64_t lane_stride;
};

// One register of floats: compilers do what it says, where loops over arrays are at the
// mercy of their vectorisers.
typedef float Pack __attribute__((vector_size(kPackBytes)));

template <typename T>
inline void load_pack(const T* at, Pack& pack) {
  if constexpr (std::is_same_v<T, float>) {
    std::memcpy(&pack, at, sizeof(pack));
  } else {
    float values[kPack];
    for (int64_t j = 0; j < kPack; ++j) {
      values[j] = load<float>(at[j]);
    }
    std::memcpy(&pack, values, sizeof(pack));
  }
}

// Sums in float over N packs of neighbouring lanes. Lanes before `skip` have been
// summed already.
template <int64_t N, typename T>
void sum_packs(const T* x, int64_t row_stride, int64_t rows, const bool* mask,
               const float* shift, double* d1, double* d2, int64_t skip = 0) {
  Pack s[N];
  Pack s1[N] = {};
  Pack s2[N] = {};
  for (int64_t k = 0; k < N; ++k) {
    load_pack(shift + k * kPack, s[k]);
  }
  for (int64_t r = 0; r < rows; ++r, x += row_stride) {
    if (mask != nullptr && !mask[r]) {
      continue;
    }
    for (int64_t k = 0; k < N; ++k) {
      Pack d;
      load_pack(x + k * kPack, d);
      d -= s[k];
      s1[k] += d;
      s2[k] += d * d;
    }
  }
  for (int64_t j = skip; j < N * kPack; ++j) {
    d1[j] += s1[j / kPack][j % kPack];
    d2[j] += s2[j / kPack][j % kPack];
  }
}

// The same for one lane: of rows that are shorter than a register, or strided.
template <typename T>
void sum_lane(const T* x, int64_t row_stride, int64_t rows, const bool* mask,
              float shift, double* d1, double* d2) {
  float s1 = 0;
  float s2 = 0;
  for (int64_t r = 0; r < rows; ++r) {
    if (mask == nullptr || mask[r]) {
      const float d = load<float>(x[r * row_stride]) - shift;
      s1 += d;
      s2 += d * d;
    }
  }
  *d1 += s1;
  *d2 += s2;
}

// Sums in float over rows that are too wide for registers to hold all sums. Rows are
// read whole, some at a time: memory is then read in order, and the sums, which stay in
// the cache, are not touched for each row.
template <typename T>
void sum_wide(const T* x, int64_t row_stride, int64_t rows, int64_t lanes,
              const float* shift, double* d1, double* d2) {
  constexpr int64_t kRows = 4;
  thread_local std::vector<float> block;
  const int64_t packs = lanes / kPack;
  block.assign(2 * packs * kPack, 0.f);
  float* const s1 = block.data();
  float* const s2 = s1 + packs * kPack;
  int64_t r = 0;
  const auto add = [&](auto count) {
    constexpr int64_t n = decltype(count)::value;
    const T* at = x + r * row_stride;
    for (int64_t j = 0; j < packs * kPack; j += kPack) {
      Pack s, a, b;
      load_pack(shift + j, s);
      load_pack(s1 + j, a);
      load_pack(s2 + j, b);
      for (int64_t i = 0; i < n; ++i) {
        Pack d;
        load_pack(at + i * row_stride + j, d);
        d -= s;
        a += d;
        b += d * d;
      }
      std::memcpy(s1 + j, &a, sizeof(a));
      std::memcpy(s2 + j, &b, sizeof(b));
    }
    r += n;
  };
  while (r + kRows <= rows) {
    add(std::integral_constant<int64_t, kRows>());
  }
  while (r < rows) {
    add(std::integral_constant<int64_t, 1>());
  }
  for (int64_t j = 0; j < packs * kPack; ++j) {
    d1[j] += s1[j];
    d2[j] += s2[j];
  }
  for (int64_t j = packs * kPack; j < lanes; ++j) {
    sum_lane(x + j, row_stride, rows, nullptr, shift[j], d1 + j, d2 + j);
  }
}

template <typename T>
void sum_in_float(const Rows<const T>& x, int64_t rows, const bool* mask, int64_t lanes,
                  const float* shift, double* d1, double* d2) {
  for (int64_t r = 0; r < rows; r += kFlushRows) {
    const int64_t n = std::min(kFlushRows, rows - r);
    const bool* m = mask != nullptr ? mask + r : nullptr;
    const T* at = x.data + r * x.row_stride;
    const int64_t stride = x.row_stride;
    if (x.lane_stride != 1 || lanes < kPack) {
      for (int64_t j = 0; j < lanes; ++j) {
        sum_lane(at + j * x.lane_stride, stride, n, m, shift[j], d1 + j, d2 + j);
      }
      continue;
    }
    if (lanes > kPacks * kPack && m == nullptr) {
      sum_wide(at, stride, n, lanes, shift, d1, d2);
      continue;
    }
    int64_t j = 0;
    for (; j + kPacks * kPack <= lanes; j += kPacks * kPack) {
      sum_packs<kPacks>(at + j, stride, n, m, shift + j, d1 + j, d2 + j);
    }
    for (; j + kPack <= lanes; j += kPack) {
      sum_packs<1>(at + j, stride, n, m, shift + j, d1 + j, d2 + j);
    }
    if (j < lanes) {
      const int64_t last = lanes - kPack;
      sum_packs<1>(at + last, stride, n, m, shift + last, d1 + last, d2 + last,
                   j - last);
    }
  }
}

template <typename T>
void sum_in_double(const Rows<const T>& x, int64_t rows, const bool* mask,
                   int64_t features, const double* shift, double* n, double* d1,
                   double* d2) {
  for (int64_t r = 0; r < rows; ++r) {
    if (mask != nullptr && !mask[r]) {
      continue;
    }
    const T* row = x.data + r * x.row_stride;
    for (int64_t f = 0; f < features; ++f) {
      const double value = load<double>(row[f * x.lane_stride]);
      const Partial p = reduce({n[f], d1[f], d2[f]}, value, shift[f]);
      n[f] = p.n;
      d1[f] = p.d1;
      d2[f] = p.d2;
    }
  }
}

// The float sums of a piece, straight into its partials. Returns whether they all can
// be trusted.
template <typename T>
bool accumulate_fast(const Rows<const T>& x, int64_t rows, double counted,
                     const bool* mask, int64_t group, int64_t features,
                     const double* shift, bool is_anchored, double* n, double* d1,
                     double* d2) {
  if (group == 1) {
    thread_local std::vector<float> rounded;
    rounded.assign(shift, shift + features);
    sum_in_float(x, rows, mask, features, rounded.data(), d1, d2);
  } else {
    const int64_t lanes = group * features;
    float lane_shift[kLanes];
    double l1[kLanes] = {};
    double l2[kLanes] = {};
    for (int64_t j = 0; j < lanes; ++j) {
      lane_shift[j] = static_cast<float>(shift[j % features]);
    }
    const int64_t whole = rows / group;
    sum_in_float(Rows<const T>{x.data, lanes, 1}, whole, nullptr, lanes, lane_shift, l1,
                 l2);
    const int64_t tail = (rows - whole * group) * features;
    sum_in_float(Rows<const T>{x.data + whole * lanes, lanes, 1}, 1, nullptr, tail,
                 lane_shift, l1, l2);
    for (int64_t j = 0; j < lanes; ++j) {
      d1[j % features] += l1[j];
      d2[j % features] += l2[j];
    }
  }
  bool good = true;
  for (int64_t f = 0; f < features; ++f) {
    n[f] = counted;
    good &= trustworthy(counted, d1[f], d2[f], is_anchored);
  }
  return good;
}

template <typename T>
void accumulate(const Key& key, const Work& work, const Piece& piece) {
  const Range rows = rows_of(work.plan, piece.chunk);
  const Range features = features_of(work.plan, piece.block);
  const T* data = static_cast<const T*>(key.x.data) + rows.begin * key.x.row_stride +
                  features.begin * key.x.feature_stride;
  const Rows<const T> x{data, key.x.row_stride, key.x.feature_stride};
  const bool* mask = key.mask != nullptr ? key.mask + rows.begin : nullptr;

  int64_t counted = rows.size();
  if (mask != nullptr) {
    counted = std::count(mask, mask + rows.size(), true);
  }
  if (piece.block == 0) {
    work.counted[piece.chunk] = static_cast<double>(counted);
  }
  double* n = work.partials + piece.chunk * 3 * work.plan.features + features.begin;
  double* d1 = n + work.plan.features;
  double* d2 = d1 + work.plan.features;
  const double* shift = work.shift + features.begin;

  const auto clear = [&] {
    std::fill(n, n + features.size(), 0.);
    std::fill(d1, d1 + features.size(), 0.);
    std::fill(d2, d2 + features.size(), 0.);
  };
  clear();
  if constexpr (std::is_same_v<typename Compute<T>::type, float>) {
    if (rows.size() >= kFewRows) {
      const int64_t group = mask == nullptr ? work.group : 1;
      if (accumulate_fast(x, rows.size(), static_cast<double>(counted), mask, group,
                          features.size(), shift, work.is_anchored, n, d1, d2)) {
        return;
      }
      clear();
    }
  }
  sum_in_double(x, rows.size(), mask, features.size(), shift, n, d1, d2);
}

// The shift of a feature: the running mean, or the first sample while there is none,
// rounded to what the sums are taken in.
template <typename T>
double shift_of(const Key& key, const Moments& state, int64_t f) {
  using C = typename Compute<T>::type;
  double shift =
      load<double>(static_cast<const T*>(key.x.data)[f * key.x.feature_stride]);
  if (state.used() > 0) {
    shift = state.sum / state.used();
  }
  shift = static_cast<double>(static_cast<C>(shift));
  return usable(shift) ? shift : 0.;
}

// --------------------------------------------------------------------- 2. finish

void finish(const Key& key, const Work& work, Range features, Weights weights,
            double eps) {
  double samples = 0;
  for (int64_t c = 0; c < work.plan.row_chunks; ++c) {
    samples += work.counted[c];
  }
  for (int64_t f = features.begin; f < features.end; ++f) {
    Partial p;
    for (int64_t c = 0; c < work.plan.row_chunks; ++c) {
      p = combine(p, work.partial(c, f));
    }
    Moments batch = unshift(p, work.shift[f], samples);
    const double left_out = batch.missing;
    Moments state = read_state(key.state, f);
    if (key.state.nonfinite == nullptr) {
      batch = impute(batch, state);
    }
    if (samples > 0) {
      state = write_state(key.state, f, key.features, fold(state, batch, weights),
                          left_out);
    }
    work.statistic[f] = statistic(state, eps);
  }
}

void finish_count(const Key& key, const Work& work, Weights weights) {
  Moments batch;
  for (int64_t c = 0; c < work.plan.row_chunks; ++c) {
    batch.count += work.counted[c];
  }
  Moments state;
  state.count = read(key.state.count, key.state.count_dtype, 0);
  write_count(key.state, fold(state, batch, weights).count);
}

// ---------------------------------------------------------------------- 3. apply

// The coefficients of a map for every lane, as arrays: [3][lanes].
template <template <typename> class Map, typename C>
const C* coefficients(const Statistic* statistic, int64_t features, int64_t lanes) {
  thread_local std::vector<C> block;
  block.resize(3 * lanes);
  for (int64_t f = 0; f < features; ++f) {
    const auto [a, b, c] = Map<C>::of(statistic[f]);
    for (int64_t j = f; j < lanes; j += features) {
      block[j] = a;
      block[lanes + j] = b;
      block[2 * lanes + j] = c;
    }
  }
  return block.data();
}

template <typename Map, typename C, typename In, typename Out>
void apply_rows(const Rows<const In>& x, const Rows<Out>& y, int64_t rows,
                int64_t lanes, const C* a, int64_t width) {
  const C* b = a + width;
  const C* c = b + width;
  const bool unit = x.lane_stride == 1 && y.lane_stride == 1;
  for (int64_t r = 0; r < rows; ++r) {
    const In* in_row = x.data + r * x.row_stride;
    Out* out_row = y.data + r * y.row_stride;
    if (unit) {
      // x and y are one tensor or two that share nothing.
#pragma GCC ivdep
      for (int64_t j = 0; j < lanes; ++j) {
        out_row[j] = store<Out>(Map{a[j], b[j], c[j]}(load<C>(in_row[j])));
      }
    } else {
      for (int64_t j = 0; j < lanes; ++j) {
        out_row[j * y.lane_stride] =
            store<Out>(Map{a[j], b[j], c[j]}(load<C>(in_row[j * x.lane_stride])));
      }
    }
  }
}

template <template <typename> class Map, typename In, typename Out>
void apply(const Key& key, const Work& work, const Piece& piece) {
  constexpr bool in_double =
      std::is_same_v<typename Compute<In>::type, double> || std::is_same_v<Out, double>;
  using C = std::conditional_t<in_double, double, float>;
  const Range rows = rows_of(work.plan, piece.chunk);
  const Range features = features_of(work.plan, piece.block);
  Rows<const In> x{static_cast<const In*>(key.x.data) + rows.begin * key.x.row_stride +
                       features.begin * key.x.feature_stride,
                   key.x.row_stride, key.x.feature_stride};
  Rows<Out> y{static_cast<Out*>(key.y.data) + rows.begin * key.y.row_stride +
                  features.begin * key.y.feature_stride,
              key.y.row_stride, key.y.feature_stride};

  const int64_t group = std::min(work.group, group_of(key.y, key.features));
  const int64_t width = group * features.size();
  const C* abc =
      coefficients<Map, C>(work.statistic + features.begin, features.size(), width);
  const int64_t whole = rows.size() / group;
  x.row_stride *= group;
  y.row_stride *= group;
  apply_rows<Map<C>>(x, y, whole, width, abc, width);
  const int64_t tail = rows.size() - whole * group;
  if (tail > 0) {
    x.data += whole * x.row_stride;
    y.data += whole * y.row_stride;
    apply_rows<Map<C>>(x, y, 1, tail * features.size(), abc, width);
  }
}

// Floating-point values keep their type; integers come out in any floating type.
void normalize_piece(const Key& key, const Work& work, const Piece& piece) {
  dispatch_any(key.x.dtype, [&](auto in) {
    using In = typename decltype(in)::type;
    if constexpr (std::is_integral_v<In>) {
      dispatch_float(key.y.dtype, [&](auto out) {
        apply<Affine, In, typename decltype(out)::type>(key, work, piece);
      });
    } else {
      apply<Affine, In, In>(key, work, piece);
    }
  });
}

void denormalize_piece(const Key& key, const Work& work, const Piece& piece) {
  dispatch_float(key.x.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    apply<InverseAffine, T, T>(key, work, piece);
  });
}

using ApplyPiece = void (*)(const Key& key, const Work& work, const Piece& piece);

void apply_all(const std::vector<Key>& keys, const std::vector<Work>& work,
               const Pieces& pieces, ApplyPiece apply_piece, ParallelFor parallel_for) {
  parallel_for(pieces.size(), [&](int64_t begin, int64_t end) {
    for (int64_t i = end - 1; i >= begin; --i) {
      const Piece piece = pieces[i];
      if (keys[piece.key].y.data != nullptr) {
        apply_piece(keys[piece.key], work[piece.key], piece);
      }
    }
  });
}

// ------------------------------------------------------------------------ set up

ParallelFor serial_if_small(const std::vector<Key>& keys, ParallelFor parallel_for) {
  int64_t values = 0;
  for (const Key& key : keys) {
    values += key.samples * key.features;
  }
  if (values >= kSerialValues) {
    return parallel_for;
  }
  return [](int64_t n, const Body& body) { body(0, n); };
}

std::vector<Work> make_work(const std::vector<Key>& keys, bool sums) {
  std::vector<Work> work(keys.size());
  size_t doubles = 0;
  for (size_t k = 0; k < keys.size(); ++k) {
    work[k].plan = make_plan(keys[k].samples, keys[k].features);
    work[k].group = group_of(keys[k].x, keys[k].features);
    const Plan& p = work[k].plan;
    doubles += 2 * p.features;
    if (sums) {
      doubles += p.features + p.row_chunks * (3 * p.features + 1);
    }
  }
  double* at = workspace(doubles);
  for (Work& w : work) {
    const Plan& p = w.plan;
    w.statistic = reinterpret_cast<Statistic*>(at);
    at += 2 * p.features;
    if (sums) {
      w.shift = at;
      at += p.features;
      w.partials = at;
      at += p.row_chunks * 3 * p.features;
      w.counted = at;
      at += p.row_chunks;
    }
  }
  return work;
}

void apply_state(const std::vector<Key>& keys, double eps, ApplyPiece apply_piece,
                 ParallelFor parallel_for) {
  parallel_for = serial_if_small(keys, parallel_for);
  const std::vector<Work> work = make_work(keys, /*sums=*/false);
  for (size_t k = 0; k < keys.size(); ++k) {
    for (int64_t f = 0; f < keys[k].features; ++f) {
      work[k].statistic[f] = statistic(read_state(keys[k].state, f), eps);
    }
  }
  apply_all(keys, work, Pieces(work), apply_piece, parallel_for);
  trim_workspace();
}

}  // namespace

void update(const std::vector<Key>& keys, Weights weights, double eps,
            ParallelFor parallel_for) {
  parallel_for = serial_if_small(keys, parallel_for);
  std::vector<Work> work = make_work(keys, /*sums=*/true);
  const Pieces pieces(work);
  for (size_t k = 0; k < keys.size(); ++k) {
    if (keys[k].samples > 0) {
      dispatch_any(keys[k].x.dtype, [&](auto type) {
        for (int64_t f = 0; f < keys[k].features; ++f) {
          const Moments state = read_state(keys[k].state, f);
          work[k].shift[f] = shift_of<typename decltype(type)::type>(keys[k], state, f);
          work[k].is_anchored &=
              anchored(state.used(), static_cast<double>(keys[k].samples), weights);
        }
      });
    }
  }
  parallel_for(pieces.size(), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Piece piece = pieces[i];
      const Key& key = keys[piece.key];
      dispatch_any(key.x.dtype, [&](auto type) {
        accumulate<typename decltype(type)::type>(key, work[piece.key], piece);
      });
    }
  });
  for (size_t k = 0; k < keys.size(); ++k) {
    const Plan& plan = work[k].plan;
    const auto finish_blocks = [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        finish(keys[k], work[k], features_of(plan, b), weights, eps);
      }
    };
    if (plan.feature_blocks > 1) {
      parallel_for(plan.feature_blocks, finish_blocks);
    } else {
      finish_blocks(0, plan.feature_blocks);
    }
    // Last: every feature of the key reads the old count.
    finish_count(keys[k], work[k], weights);
  }
  apply_all(keys, work, pieces, normalize_piece, parallel_for);
  trim_workspace();
}

void normalize(const std::vector<Key>& keys, double eps, ParallelFor parallel_for) {
  apply_state(keys, eps, normalize_piece, parallel_for);
}

void denormalize(const std::vector<Key>& keys, double eps, ParallelFor parallel_for) {
  apply_state(keys, eps, denormalize_piece, parallel_for);
}

void merge(const State& state, const State& batch, int64_t features, Weights weights) {
  Moments count;
  for (int64_t f = 0; f < features; ++f) {
    const Moments old = read_state(state, f);
    Moments b = read_state(batch, f);
    const double left_out =
        batch.nonfinite != nullptr ? batch.nonfinite[features + f] : 0.;
    if (state.nonfinite == nullptr) {
      b = impute(b, old);
    }
    if (b.count > 0) {
      write_state(state, f, features, fold(old, b, weights), left_out);
    }
  }
  count.count = read(state.count, state.count_dtype, 0);
  Moments batch_count;
  batch_count.count = read(batch.count, batch.count_dtype, 0);
  write_count(state, fold(count, batch_count, weights).count);
}

}  // namespace VECNORM_ISA
}  // namespace cpu
}  // namespace vecnorm
