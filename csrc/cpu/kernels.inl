// Copyright (c) the torchrl_vecnorm authors.
//
// This source code is licensed under the MIT license found in the
// LICENSE file in the root directory of this source tree.

// The CPU kernels. This file is compiled once for each instruction set, by isa_*.cpp,
// which define VECNORM_ISA (a namespace) and what pack.inl needs.
//
// update() goes over the pieces of the plan in phases, all keys together:
//
//   1. prepare     the shift of every feature
//   2. accumulate  every piece sums d and d² of its rows around the key's shift. Float
//                  inputs are summed in float, a few rows at a time, and flushed to
//                  double; sums that cannot be trusted (moments.h) are taken again in
//                  double. So the common case runs at the speed of float and the rare
//                  ones (NaN, overflow, a shift far off) cost a second look.
//   3. finish      the pieces of a feature are combined in order, folded into the state
//                  and projected to the coefficients of the map.
//   4. apply       y = (x - loc) / scale, each thread going backwards over what it has
//                  just read, so that the newest values still come from its cache.
//
// Rows of few features are handled several at a time, so that they fill registers.

#include "pack.inl"
// In this order: each builds on those before it.
#include "accumulate.inl"
#include "apply.inl"

namespace vecnorm {
namespace cpu {
namespace VECNORM_ISA {
namespace {

// Calls with fewer values than that stay on the calling thread: waking the others takes
// longer.
constexpr int64_t kSerialValues = 32768;
// Features that one part of phases 1 and 3 takes.
constexpr int64_t kSomeFeatures = 64;
// So many of these are done before the threads start.
constexpr int64_t kSerialParts = 64;

// ---------------------------------------------------------------------- the state

// The moments of some features, as arrays: loops over them become packs of features,
// where one feature after the other would wait for each division.
struct Some {
  int64_t size;
  double count;
  double sum[kSomeFeatures];
  double ssq[kSomeFeatures];
  double missing[kSomeFeatures];
  double var[kSomeFeatures];

  inline Moments operator[](int64_t i) const {
    return {sum[i], ssq[i], count, missing[i], var[i]};
  }

  inline void set(int64_t i, const Moments& m) {
    sum[i] = m.sum;
    ssq[i] = m.ssq;
    missing[i] = m.missing;
    var[i] = m.var;
  }

  // The variance that is there, or that of the sums.
  void settle(const State& s) {
    if (s.central.data == nullptr) {
      for (int64_t i = 0; i < size; ++i) {
        var[i] = (*this)[i].var_of_sums();
      }
      return;
    }
    const Rounding rounding = s.rounding();
    for (int64_t i = 0; i < size; ++i) {
      var[i] = kept_var(var[i], (*this)[i], rounding);
    }
  }
};

void read_leaf(const Leaf& leaf, Range range, double* to) {
  if (leaf.data == nullptr) {
    std::fill_n(to, range.size(), 0.);
  } else if (leaf.dtype == Dtype::kFloat64) {
    std::copy_n(static_cast<const double*>(leaf.data) + range.begin, range.size(), to);
  } else {
    std::copy_n(static_cast<const float*>(leaf.data) + range.begin, range.size(), to);
  }
}

// Leaves in `values` what can be read there from now on.
void write_leaf(const Leaf& leaf, Range range, double* values) {
  if (leaf.data == nullptr) {
    return;
  }
  if (leaf.dtype == Dtype::kFloat64) {
    std::copy_n(values, range.size(), static_cast<double*>(leaf.data) + range.begin);
    return;
  }
  float* to = static_cast<float*>(leaf.data) + range.begin;
  for (int64_t i = 0; i < range.size(); ++i) {
    to[i] = static_cast<float>(values[i]);
    values[i] = to[i];
  }
}

void read_some(const State& s, Range features, Some& m) {
  m.size = features.size();
  m.count = s.count.read(0);
  read_leaf(s.sum, features, m.sum);
  read_leaf(s.ssq, features, m.ssq);
  read_leaf(s.nonfinite, features, m.missing);
  read_leaf(s.central, features, m.var);
  m.settle(s);
}

bool any(const double* values, int64_t n) {
  int64_t found = 0;
  for (int64_t i = 0; i < n; ++i) {
    found += values[i] != 0 ? 1 : 0;
  }
  return found > 0;
}

// Writes all but `count`, which the features of a key share; `m` is then what can be
// read. Counters of missing values are left alone while nothing is missing.
void write_some(const State& s, Range features, int64_t all, Some& m, bool was_missing,
                double* left_out) {
  m.count = s.count.rounded(m.count);
  write_leaf(s.sum, features, m.sum);
  write_leaf(s.ssq, features, m.ssq);
  if (was_missing || any(left_out, m.size)) {
    write_leaf(s.nonfinite, features, m.missing);
    if (s.nonfinite.data != nullptr) {
      const Range total{all + features.begin, all + features.end};
      double before[kSomeFeatures];
      read_leaf(s.nonfinite, total, before);
      for (int64_t i = 0; i < m.size; ++i) {
        before[i] += left_out[i];
      }
      write_leaf(s.nonfinite, total, before);
    }
  }
  write_leaf(s.central, features, m.var);
  m.settle(s);
}

// ----------------------------------------------------------------- the workspace

// What one key needs between the phases. The arrays live in one block that the calling
// thread keeps.
struct Work {
  Plan plan;
  int64_t group = 1;             // rows taken as one by apply
  bool in_double = false;        // apply's arithmetic
  bool may_stream = false;       // y may be written around the caches
  double* shift = nullptr;       // [features]
  double* anchors = nullptr;     // for every kSomeFeatures: 1 where all are (moments.h)
  double* partials = nullptr;    // [row_chunks][3][features]: n, d1, d2
  double* counted = nullptr;     // [row_chunks]
  void* coefficients = nullptr;  // [3][group × features], float or double

  Totals totals(int64_t chunk) const {
    double* n = partials + chunk * 3 * plan.features;
    return {n, n + plan.features, n + 2 * plan.features};
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

int64_t size_of(Dtype dtype) {
  int64_t size = 0;
  dispatch_any(dtype, [&](auto type) { size = sizeof(typename decltype(type)::type); });
  return size;
}

bool needs_double(Dtype dtype) {
  bool needs = false;
  dispatch_any(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    needs = std::is_same_v<typename Compute<T>::type, double>;
  });
  return needs;
}

std::vector<Work> make_work(const std::vector<Key>& keys, bool sums) {
  std::vector<Work> work(keys.size());
  size_t doubles = 0;
  for (size_t k = 0; k < keys.size(); ++k) {
    const Key& key = keys[k];
    Work& w = work[k];
    w.plan = make_plan(key.samples, key.features);
    w.in_double = needs_double(key.x.dtype) || key.y.dtype == Dtype::kFloat64;
    w.group = w.in_double ? std::min(group_of<double>(key.x, key.features),
                                     group_of<double>(key.y, key.features))
                          : std::min(group_of<float>(key.x, key.features),
                                     group_of<float>(key.y, key.features));
    w.may_stream = key.x.data != key.y.data &&
                   key.samples * key.features * size_of(key.y.dtype) >= kStreamBytes;
    doubles += 3 * w.group * w.plan.features;
    if (sums) {
      doubles += w.plan.features + ceil_div(w.plan.features, kSomeFeatures) +
                 w.plan.row_chunks * (3 * w.plan.features + 1);
    }
  }
  double* at = workspace(doubles);
  for (Work& w : work) {
    const Plan& p = w.plan;
    w.coefficients = at;
    at += 3 * w.group * p.features;
    if (sums) {
      w.shift = at;
      at += p.features;
      w.anchors = at;
      at += ceil_div(p.features, kSomeFeatures);
      w.partials = at;
      at += p.row_chunks * 3 * p.features;
      w.counted = at;
      at += p.row_chunks;
    }
  }
  return work;
}

// ------------------------------------------------------------------- parts of keys

// Some rows and features of a key.
struct Piece {
  int64_t key;
  int64_t chunk;
  int64_t block;
};

// The parts of all keys, numbered through.
class Numbered {
 public:
  void add(int64_t parts) { ends_.push_back(size() + parts); }
  int64_t size() const { return ends_.empty() ? 0 : ends_.back(); }
  int64_t key_of(int64_t i) const {
    return std::upper_bound(ends_.begin(), ends_.end(), i) - ends_.begin();
  }
  int64_t part_of(int64_t i, int64_t key) const {
    return key == 0 ? i : i - ends_[key - 1];
  }

 private:
  std::vector<int64_t> ends_;
};

// -------------------------------------------------------------------------- calls

// All keys of one call, and its phases. Each phase takes the parts [begin, end).
class Call {
 public:
  Call(const std::vector<Key>& keys, bool sums, double eps, bool inverse = false)
      : keys_(keys), work_(make_work(keys, sums)), eps_(eps), inverse_(inverse) {
    for (const Work& w : work_) {
      pieces_.add(w.plan.pieces());
      features_.add(ceil_div(w.plan.features, kSomeFeatures));
    }
  }

  ~Call() { trim_workspace(); }

  void update(Weights weights, RunPhases run) {
    weights_ = weights;
    const Phase prepare{features_.size(), [this](int64_t b, int64_t e) {
                          for_features(b, e, &Call::prepare);
                        }};
    const Phase finish{features_.size(), [this](int64_t b, int64_t e) {
                         for_features(b, e, &Call::finish);
                       }};
    const Phase accumulate{pieces_.size(), [this](int64_t b, int64_t e) {
                             for (int64_t i = b; i < e; ++i) {
                               this->accumulate(piece(i));
                             }
                           }};
    run_all({prepare, accumulate, finish, applying()}, run);
    // Last: every feature of a key reads its old count.
    for (size_t k = 0; k < keys_.size(); ++k) {
      finish_count(keys_[k], work_[k]);
    }
  }

  void map(RunPhases run) {
    const Phase read{features_.size(), [this](int64_t b, int64_t e) {
                       for_features(b, e, &Call::project_state);
                     }};
    run_all({read, applying()}, run);
  }

 private:
  // The first phase is about features only, and seldom worth a start of all threads.
  void run_all(std::vector<Phase> phases, RunPhases run) const {
    int64_t values = 0;
    for (const Key& key : keys_) {
      values += key.samples * key.features;
    }
    const bool serial = values < kSerialValues;
    size_t alone = 0;
    while (alone < phases.size() &&
           (serial || (alone == 0 && phases[0].parts <= kSerialParts))) {
      phases[alone].body(0, phases[alone].parts);
      ++alone;
    }
    if (alone < phases.size()) {
      phases.erase(phases.begin(), phases.begin() + static_cast<int64_t>(alone));
      run(phases);
    }
  }

  Phase applying() {
    return {pieces_.size(), [this](int64_t begin, int64_t end) {
              for (int64_t i = end - 1; i >= begin; --i) {
                apply(piece(i));
              }
            }};
  }

  Piece piece(int64_t i) const {
    const int64_t key = pieces_.key_of(i);
    const int64_t at = pieces_.part_of(i, key);
    const int64_t blocks = work_[key].plan.feature_blocks;
    return {key, at / blocks, at % blocks};
  }

  void for_features(int64_t begin, int64_t end,
                    void (Call::*body)(const Key&, const Work&, Range)) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t key = features_.key_of(i);
      const int64_t at = features_.part_of(i, key) * kSomeFeatures;
      const int64_t features = keys_[key].features;
      (this->*body)(keys_[key], work_[key],
                    {at, std::min(at + kSomeFeatures, features)});
    }
  }

  // The shift of a feature: the running mean, or the first sample while there is none,
  // rounded to what the sums are taken in.
  void prepare(const Key& key, const Work& work, Range features) {
    if (key.samples == 0) {
      return;
    }
    Some state;
    read_some(key.state, features, state);
    double* shift = work.shift + features.begin;
    double used[kSomeFeatures];
    int64_t unknown = 0;
    int64_t adrift = 0;
    for (int64_t i = 0; i < state.size; ++i) {
      used[i] = state[i].used();
      shift[i] = state[i].loc();
      unknown += used[i] > 0 ? 0 : 1;
      const bool holds = anchored(used[i], static_cast<double>(key.samples), weights_);
      adrift += holds ? 0 : 1;
    }
    dispatch_any(key.x.dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      if (unknown > 0) {
        double first[kSomeFeatures];
        read_first<T>(key, features, first);
        for (int64_t i = 0; i < state.size; ++i) {
          shift[i] = used[i] > 0 ? shift[i] : first[i];
        }
      }
      for (int64_t i = 0; i < state.size; ++i) {
        shift[i] =
            static_cast<double>(static_cast<typename Compute<T>::type>(shift[i]));
        shift[i] = usable(shift[i]) ? shift[i] : 0.;
      }
    });
    work.anchors[features.begin / kSomeFeatures] = adrift == 0 ? 1. : 0.;
  }

  // The first sample that counts: others may be anything.
  template <typename T>
  void read_first(const Key& key, Range features, double* to) const {
    const bool* end = key.mask + key.samples;
    const int64_t found =
        key.mask != nullptr ? std::find(key.mask, end, true) - key.mask : 0;
    const int64_t first = found < key.samples ? found : 0;
    const T* row = static_cast<const T*>(key.x.data) + first * key.x.row_stride;
    for (int64_t f = features.begin; f < features.end; ++f) {
      to[f - features.begin] = load<double>(row[f * key.x.feature_stride]);
    }
  }

  void accumulate(const Piece& piece) const {
    const Key& key = keys_[piece.key];
    const Work& work = work_[piece.key];
    const Range rows = rows_of(work.plan, piece.chunk);
    const Range features = features_of(work.plan, piece.block);
    const bool* mask = key.mask != nullptr ? key.mask + rows.begin : nullptr;
    const int64_t counted =
        mask != nullptr ? std::count(mask, mask + rows.size(), true) : rows.size();
    if (piece.block == 0) {
      work.counted[piece.chunk] = static_cast<double>(counted);
    }
    const double* end = work.anchors + ceil_div(key.features, kSomeFeatures);
    const bool is_anchored = std::find<const double*>(work.anchors, end, 0.) == end;
    dispatch_any(key.x.dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      sum_piece<T>(key.x, rows, features, mask, counted, work.shift + features.begin,
                   is_anchored, work.totals(piece.chunk) + features.begin);
    });
  }

  void finish(const Key& key, const Work& work, Range features) {
    double samples = 0;
    double n[kSomeFeatures] = {};
    double d1[kSomeFeatures] = {};
    double d2[kSomeFeatures] = {};
    for (int64_t c = 0; c < work.plan.row_chunks; ++c) {
      const Totals part = work.totals(c) + features.begin;
      for (int64_t i = 0; i < features.size(); ++i) {
        n[i] += part.n[i];
        d1[i] += part.d1[i];
        d2[i] += part.d2[i];
      }
      samples += work.counted[c];
    }
    Some state;
    read_some(key.state, features, state);
    if (samples > 0) {
      const double* shift = work.shift + features.begin;
      const bool was_missing = any(state.missing, state.size);
      const bool counts = key.state.nonfinite.data != nullptr;
      double left_out[kSomeFeatures];
      const auto fold_all = [&](auto batch_of) {
        for (int64_t i = 0; i < state.size; ++i) {
          const Moments batch = unshift({n[i], d1[i], d2[i]}, shift[i], samples);
          left_out[i] = batch.missing;
          state.set(i, fold_some(state[i], batch_of(batch, i), weights_));
        }
      };
      if (counts) {
        fold_all([](const Moments& batch, int64_t) { return batch; });
      } else {
        fold_all(
            [&](const Moments& batch, int64_t i) { return impute(batch, state[i]); });
      }
      state.count = weights_.keep * state.count + weights_.weight * samples;
      write_some(key.state, features, key.features, state, was_missing, left_out);
    }
    project(key, work, features.begin, state);
  }

  void finish_count(const Key& key, const Work& work) const {
    Moments batch;
    for (int64_t c = 0; c < work.plan.row_chunks; ++c) {
      batch.count += work.counted[c];
    }
    Moments state;
    state.count = key.state.count.read(0);
    key.state.count.write(0, fold(state, batch, weights_).count);
  }

  void project_state(const Key& key, const Work& work, Range features) {
    Some state;
    read_some(key.state, features, state);
    project(key, work, features.begin, state);
  }

  // From the moments to the coefficients of the map.
  void project(const Key& key, const Work& work, int64_t begin,
               const Some& state) const {
    if (work.in_double) {
      inverse_ ? project_to<InverseAffine<double>>(key, work, begin, state)
               : project_to<Affine<double>>(key, work, begin, state);
    } else {
      inverse_ ? project_to<InverseAffine<float>>(key, work, begin, state)
               : project_to<Affine<float>>(key, work, begin, state);
    }
  }

  template <typename Map>
  void project_to(const Key& key, const Work& work, int64_t begin,
                  const Some& state) const {
    using C = decltype(std::declval<Map>()(0));
    const int64_t width = work.group * key.features;
    const Coefficients<C> k = Coefficients<C>(work.coefficients, width) + begin;
    const Rounding rounding = key.state.rounding();
    double std[kSomeFeatures];
    roots(state.var, state.size, std);
    for (int64_t i = 0; i < state.size; ++i) {
      const auto [a, b, c] = Map::of(statistic(state[i], std[i], eps_, rounding));
      k.a[i] = a;
      k.b[i] = b;
      k.c[i] = c;
    }
    for (int64_t row = 1; row < work.group; ++row) {
      const int64_t at = row * key.features;
      std::copy_n(k.a, state.size, k.a + at);
      std::copy_n(k.b, state.size, k.b + at);
      std::copy_n(k.c, state.size, k.c + at);
    }
  }

  // Floating-point values keep their type; integers come out in any floating type.
  void apply(const Piece& piece) const {
    const Key& key = keys_[piece.key];
    if (key.y.data == nullptr) {
      return;
    }
    dispatch_any(key.x.dtype, [&](auto in) {
      using In = typename decltype(in)::type;
      if constexpr (std::is_integral_v<In>) {
        dispatch_float(key.y.dtype, [&](auto out) {
          apply_as<Affine, In, typename decltype(out)::type>(key, piece);
        });
      } else if (inverse_) {
        apply_as<InverseAffine, In, In>(key, piece);
      } else {
        apply_as<Affine, In, In>(key, piece);
      }
    });
  }

  template <template <typename> class Map, typename In, typename Out>
  void apply_as(const Key& key, const Piece& piece) const {
    constexpr bool in_double = std::is_same_v<typename Compute<In>::type, double> ||
                               std::is_same_v<Out, double>;
    using C = std::conditional_t<in_double, double, float>;
    const Work& work = work_[piece.key];
    const Range rows = rows_of(work.plan, piece.chunk);
    const Range features = features_of(work.plan, piece.block);
    const Coefficients<C> k(work.coefficients, work.group * key.features);
    map_piece<Map, C>(rows_at<const In>(key.x, rows, features),
                      rows_at<Out>(key.y, rows, features), rows.size(), work.group,
                      features.size(), work.may_stream, k + features.begin);
  }

  const std::vector<Key>& keys_;
  std::vector<Work> work_;
  double eps_;
  bool inverse_;
  Weights weights_{};
  Numbered pieces_;
  Numbered features_;
};

}  // namespace

void update(const std::vector<Key>& keys, Weights weights, double eps, RunPhases run) {
  Call(keys, /*sums=*/true, eps).update(weights, run);
}

void normalize(const std::vector<Key>& keys, double eps, RunPhases run) {
  Call(keys, /*sums=*/false, eps).map(run);
}

void denormalize(const std::vector<Key>& keys, double eps, RunPhases run) {
  Call(keys, /*sums=*/false, eps, /*inverse=*/true).map(run);
}

void merge(const State& state, const State& batch, int64_t features, Weights weights) {
  for (int64_t f = 0; f < features; ++f) {
    const Moments old = read_state(state, f);
    Moments b = read_state(batch, f);
    const double left_out =
        batch.nonfinite.data != nullptr ? batch.nonfinite.read(features + f) : 0.;
    if (state.nonfinite.data == nullptr) {
      b = impute(b, old);
    }
    if (b.count > 0) {
      write_state(state, f, features, rounded(state, fold(old, b, weights)), left_out);
    }
  }
  Moments count;
  count.count = state.count.read(0);
  Moments batch_count;
  batch_count.count = batch.count.read(0);
  state.count.write(0, fold(count, batch_count, weights).count);
}

}  // namespace VECNORM_ISA
}  // namespace cpu
}  // namespace vecnorm
