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
//
// A key of few samples (plan.h) goes through all four strip by strip instead, within
// the first phase: update_strip(). Nothing of a strip leaves the cache in between.

#include "pack.inl"
// In this order: each builds on those before it.
#include "accumulate.inl"
#include "apply.inl"
#include "statistics.inl"

namespace vecnorm {
namespace cpu {
namespace VECNORM_ISA {
namespace {

// So many strips are prepared before the threads start.
constexpr int64_t kSerialParts = 16;

// ----------------------------------------------------------------- the workspace

// What one key needs between the phases. The arrays live in one block that the calling
// thread keeps.
struct Work {
  Plan plan;
  int64_t first = 0;             // the feature that the arrays begin with
  int64_t group = 1;             // rows taken as one by apply
  bool in_double = false;        // apply's arithmetic
  int64_t fresh_bytes = 0;       // that are written and not read
  double* shift = nullptr;       // [features]
  double* anchors = nullptr;     // for every strip: 1 where all are (moments.h)
  double* partials = nullptr;    // [row_chunks][3][features]: n, d1, d2
  double* counted = nullptr;     // [row_chunks]
  void* coefficients = nullptr;  // [3][group × features], float or double

  Totals totals(int64_t chunk) const {
    double* n = partials + chunk * 3 * plan.features;
    return {n, n + plan.features, n + 2 * plan.features};
  }
  int64_t width() const { return group * plan.features; }
};

// What a strip needs that is done in one go: it stays in the cache.
struct StripWork {
  double shift[kStrip];
  double partials[3 * kStrip];
  double coefficients[3 * kStrip];
  double anchor;
  double counted;

  Work of(const Work& key, Range features) {
    Work work = key;
    work.plan.features = features.size();
    work.first = features.begin;
    work.shift = shift;
    work.partials = partials;
    work.coefficients = coefficients;
    work.anchors = &anchor;
    work.counted = &counted;
    return work;
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
    w.plan = make_plan(key.samples, key.features, sums);
    w.in_double = needs_double(key.x.dtype) || key.y.dtype == Dtype::kFloat64;
    w.group = w.in_double ? std::min(group_of<double>(key.x, key.features),
                                     group_of<double>(key.y, key.features))
                          : std::min(group_of<float>(key.x, key.features),
                                     group_of<float>(key.y, key.features));
    w.fresh_bytes = key.x.data != key.y.data
                        ? key.samples * key.features * value_size(key.y.dtype)
                        : 0;
    if (w.plan.by_strips) {
      doubles += 1;
      continue;
    }
    doubles += 3 * w.width();
    if (sums) {
      doubles += w.plan.features + w.plan.strips() +
                 w.plan.row_chunks * (3 * w.plan.features + 1);
    }
  }
  double* at = workspace(doubles);
  for (Work& w : work) {
    const Plan& p = w.plan;
    if (p.by_strips) {
      w.counted = at++;
      continue;
    }
    w.coefficients = at;
    at += 3 * w.width();
    if (sums) {
      w.shift = at;
      at += p.features;
      w.anchors = at;
      at += p.strips();
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
  Call(const std::vector<Key>& keys, bool sums, const Rule& rule, bool inverse = false)
      : keys_(keys), work_(make_work(keys, sums)), rule_(rule), inverse_(inverse) {
    for (const Work& w : work_) {
      pieces_.add(w.plan.pieces());
      strips_.add(w.plan.strips());
    }
  }

  ~Call() { trim_workspace(); }

  void update(Weights weights, RunPhases run) {
    weights_ = weights;
    const Phase prepare{strips_.size(), [this](int64_t b, int64_t e) {
                          for_strips(b, e, &Call::update_strip, &Call::prepare);
                        }};
    const Phase finish{strips_.size(), [this](int64_t b, int64_t e) {
                         for_strips(b, e, nullptr, &Call::finish);
                       }};
    const Phase accumulate{pieces_.size(), [this](int64_t b, int64_t e) {
                             for (int64_t i = b; i < e; ++i) {
                               accumulate_piece(piece(i));
                             }
                           }};
    run_all({prepare, accumulate, finish, applying()}, run);
    // Last: every feature of a key reads its old count.
    for (size_t k = 0; k < keys_.size(); ++k) {
      finish_count(keys_[k], work_[k]);
    }
  }

  void map(RunPhases run) {
    const Phase read{strips_.size(), [this](int64_t b, int64_t e) {
                       for_strips(b, e, &Call::map_strip, &Call::project_state);
                     }};
    run_all({read, applying()}, run);
  }

 private:
  using Body = void (Call::*)(const Key&, const Work&, Range);

  // Keys that are done strip by strip are done after the first phase.
  void run_all(std::vector<Phase> phases, RunPhases run) const {
    int64_t values = 0;
    for (const Key& key : keys_) {
      values += (key.samples + kFeatureValues) * key.features;
    }
    if (pieces_.size() == 0) {
      phases.resize(1);
    }
    const bool serial = values < kSerialValues;
    // Where it prepares the others only, it is seldom worth a start of all threads.
    const bool prepares = pieces_.size() > 0 && phases[0].parts <= kSerialParts;
    size_t alone = 0;
    while (alone < phases.size() && (serial || (alone == 0 && prepares))) {
      phases[alone].body(0, phases[alone].parts);
      ++alone;
    }
    if (alone < phases.size()) {
      phases.erase(phases.begin(), phases.begin() + static_cast<int64_t>(alone));
      run(phases, values);
    }
  }

  Phase applying() {
    return {pieces_.size(), [this](int64_t begin, int64_t end) {
              for (int64_t i = end - 1; i >= begin; --i) {
                apply_piece(piece(i));
              }
            }};
  }

  Piece piece(int64_t i) const {
    const int64_t key = pieces_.key_of(i);
    const int64_t at = pieces_.part_of(i, key);
    const int64_t blocks = work_[key].plan.feature_blocks;
    return {key, at / blocks, at % blocks};
  }

  void for_strips(int64_t begin, int64_t end, Body in_one_go, Body others) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t key = strips_.key_of(i);
      const Work& work = work_[key];
      const int64_t at = strips_.part_of(i, key) * kStrip;
      const Body body = work.plan.by_strips ? in_one_go : others;
      if (body != nullptr) {
        const Range features{at, std::min(at + kStrip, work.plan.features)};
        (this->*body)(keys_[key], work, features);
      }
    }
  }

  void update_strip(const Key& key, const Work& of, Range features) {
    StripWork mine;
    const Work work = mine.of(of, features);
    const Range rows{0, key.samples};
    const Plain plain(key.state, features);
    choose_shifts(key, work, features, plain);
    const bool complete = accumulate(key, work, 0, rows, features);
    if (features.begin == 0) {
      *of.counted = mine.counted;
    }
    fold_and_project(key, work, features, plain, complete);
    apply(key, work, rows, features);
  }

  void map_strip(const Key& key, const Work& of, Range features) {
    StripWork mine;
    const Work work = mine.of(of, features);
    project_state(key, work, features);
    apply(key, work, {0, key.samples}, features);
  }

  void prepare(const Key& key, const Work& work, Range features) {
    choose_shifts(key, work, features, Plain(key.state, features));
  }

  // The shift of a feature: the running mean, or the first sample while there is none,
  // rounded to what the sums are taken in.
  void choose_shifts(const Key& key, const Work& work, Range features,
                     const Plain& plain) {
    if (key.samples == 0) {
      return;
    }
    const double samples = static_cast<double>(key.samples);
    double* shift = work.shift + features.begin - work.first;
    double& anchor = work.anchors[(features.begin - work.first) / kStrip];
    if (plain.is_there && plain.used > 0) {
      dispatch_any(key.x.dtype, [&](auto type) {
        using T = typename decltype(type)::type;
        plain.shifts<typename Compute<T>::type>(shift);
      });
      anchor = anchored(plain.used, samples, weights_) ? 1. : 0.;
      return;
    }
    Some state;
    read_some(key.state, features, state);
    int64_t unknown = 0;
    int64_t adrift = 0;
    for (int64_t i = 0; i < state.size; ++i) {
      shift[i] = state[i].near_loc();
      unknown += state.used[i] > 0 ? 0 : 1;
      adrift += anchored(state.used[i], samples, weights_) ? 0 : 1;
    }
    dispatch_any(key.x.dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      if (unknown > 0) {
        double first[kStrip];
        read_first<T>(key, features, first);
        for (int64_t i = 0; i < state.size; ++i) {
          shift[i] = state.used[i] > 0 ? shift[i] : first[i];
        }
      }
      for (int64_t i = 0; i < state.size; ++i) {
        shift[i] =
            static_cast<double>(static_cast<typename Compute<T>::type>(shift[i]));
        shift[i] = usable(shift[i]) ? shift[i] : 0.;
      }
    });
    anchor = adrift == 0 ? 1. : 0.;
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

  void accumulate_piece(const Piece& piece) const {
    const Work& work = work_[piece.key];
    accumulate(keys_[piece.key], work, piece.chunk, rows_of(work.plan, piece.chunk),
               features_of(work.plan, piece.block));
  }

  // Returns whether all values of samples that count are known to count.
  bool accumulate(const Key& key, const Work& work, int64_t chunk, Range rows,
                  Range features) const {
    const bool* mask = key.mask != nullptr ? key.mask + rows.begin : nullptr;
    const int64_t counted =
        mask != nullptr ? std::count(mask, mask + rows.size(), true) : rows.size();
    const int64_t at = features.begin - work.first;
    if (at == 0) {
      work.counted[chunk] = static_cast<double>(counted);
    }
    const double* end = work.anchors + work.plan.strips();
    const bool is_anchored = std::find<const double*>(work.anchors, end, 0.) == end;
    bool complete = false;
    dispatch_any(key.x.dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      complete = sum_piece<T>(key.x, rows, features, mask, counted, work.shift + at,
                              is_anchored, work.totals(chunk) + at);
    });
    if (complete && !work.plan.by_strips) {  // finish() adds them
      std::fill_n(work.totals(chunk).n + at, features.size(),
                  static_cast<double>(counted));
    }
    return complete;
  }

  // The sums of all chunks become those of the first.
  void finish(const Key& key, const Work& work, Range features) {
    const int64_t at = features.begin - work.first;
    const int64_t size = features.size();
    const Totals sums = work.totals(0) + at;
    for (int64_t c = 1; c < work.plan.row_chunks; ++c) {
      const Totals part = work.totals(c) + at;
      for (int64_t i = 0; i < size; ++i) {
        sums.n[i] += part.n[i];
        sums.d1[i] += part.d1[i];
        sums.d2[i] += part.d2[i];
      }
    }
    fold_and_project(key, work, features, Plain(key.state, features), false);
  }

  // `complete`: all values are known to count, and `sums.n` need not say so.
  void fold_and_project(const Key& key, const Work& work, Range features, Plain plain,
                        bool complete) const {
    const int64_t at = features.begin - work.first;
    const int64_t size = features.size();
    const Totals sums = work.totals(0) + at;
    double samples = 0;
    for (int64_t c = 0; c < work.plan.row_chunks; ++c) {
      samples += work.counted[c];
    }
    if (samples > 0 && plain.is_there &&
        (complete || std::count(sums.n, sums.n + size, samples) == size)) {
      plain.fold(sums, samples, work.shift + at, weights_);
      return project(key, work, at, plain, plain.var);
    }
    if (complete) {
      std::fill_n(sums.n, size, samples);
    }
    Some state;
    read_some(key.state, features, state);
    if (samples > 0) {
      fold_batch(key, sums, samples, work.shift + at, features, state);
    }
    project<const Some&>(key, work, at, state, state.var);
  }

  // Folds a batch's sums into the state, and leaves what can be read there in `state`.
  void fold_batch(const Key& key, const Totals& sums, double samples,
                  const double* shift, Range features, Some& state) const {
    const auto [keep, weight] = weights_;
    const bool was_missing = any(state.missing, state.size);
    double left_out[kStrip];
    double per_value[kStrip];
    double per_both[kStrip];
    for (int64_t i = 0; i < state.size; ++i) {
      left_out[i] = samples - sums.n[i];
    }
    const bool is_missing = any(left_out, state.size);
    if (was_missing || is_missing) {
      for (int64_t i = 0; i < state.size; ++i) {
        per_value[i] = inverse(sums.n[i]);
        per_both[i] = inverse(keep * state.used[i] + weight * sums.n[i]);
      }
    } else {
      std::fill_n(per_value, state.size, inverse(samples));
      std::fill_n(per_both, state.size,
                  inverse(keep * state.used[0] + weight * samples));
    }
    const auto batch_of = [&](int64_t i) {
      const Partial p{sums.n[i], sums.d1[i], sums.d2[i]};
      return unshift(p, per_value[i], shift[i], samples);
    };
    if (is_missing && key.state.nonfinite.data == nullptr) {
      for (int64_t i = 0; i < state.size; ++i) {
        state.set(i, fold(state[i], impute(batch_of(i), state[i]), weights_));
      }
    } else {
      for (int64_t i = 0; i < state.size; ++i) {
        state.set(i, fold_some(state[i], batch_of(i), weights_, per_both[i]));
      }
    }
    state.count = keep * state.count + weight * samples;
    write_some(key.state, features, key.features, state, was_missing, left_out);
  }

  void finish_count(const Key& key, const Work& work) const {
    Moments batch;
    for (int64_t c = 0; c < work.plan.row_chunks; ++c) {
      batch.count += work.counted[c];
    }
    Moments state;
    state.count = key.state.count.read(0);
    key.state.write_count(fold(state, batch, weights_).count, batch.count);
  }

  void project_state(const Key& key, const Work& work, Range features) {
    const int64_t at = features.begin - work.first;
    const Plain plain(key.state, features);
    if (plain.is_there) {
      double var[kStrip];
      plain.settle(var);
      return project(key, work, at, plain, var);
    }
    Some state;
    read_some(key.state, features, state);
    project<const Some&>(key, work, at, state, state.var);
  }

  // From the moments (Plain, or Some by reference) to the coefficients of the map.
  // Plain is a copy: what its features share cannot change then, which packs of doubles
  // need.
  template <typename Strip>
  void project(const Key& key, const Work& work, int64_t begin, Strip state,
               const double* var) const {
    if (work.in_double) {
      inverse_ ? project_to<InverseAffine<double>, Strip>(key, work, begin, state, var)
               : project_to<Affine<double>, Strip>(key, work, begin, state, var);
    } else {
      inverse_ ? project_to<InverseAffine<float>, Strip>(key, work, begin, state, var)
               : project_to<Affine<float>, Strip>(key, work, begin, state, var);
    }
  }

  template <typename Map, typename Strip>
  void project_to(const Key& key, const Work& work, int64_t begin, Strip state,
                  const double* var) const {
    using C = decltype(std::declval<Map>()(0, 0));
    const Coefficients<C> k = Coefficients<C>(work.coefficients, work.width()) + begin;
    const Rounding rounding = key.state.rounding();
    const Scaling scaling = rule_.scaling;
    for (int64_t i = 0; i < state.size; ++i) {
      const Moments m = state[i];
      const double root = std::sqrt(scaling.widened(var[i]));
      const Statistic s = statistic(m, m.corrected_loc(), root, scaling, rounding);
      const MapNumbers map = Map::wide(s);
      k.a[i] = static_cast<C>(map.a);
      k.b[i] = static_cast<C>(map.b);
      k.c[i] = static_cast<C>(map.c);
    }
    for (C* values : {k.a, k.b, k.c}) {
      repeat(values, work.plan.features, work.group);
    }
  }

  // Floating-point values keep their type; integers come out in any floating type.
  void apply_piece(const Piece& piece) const {
    const Work& work = work_[piece.key];
    apply(keys_[piece.key], work, rows_of(work.plan, piece.chunk),
          features_of(work.plan, piece.block));
  }

  void apply(const Key& key, const Work& work, Range rows, Range features) const {
    if (key.y.data == nullptr) {
      return;
    }
    dispatch_any(key.x.dtype, [&](auto in) {
      using In = typename decltype(in)::type;
      if constexpr (std::is_integral_v<In>) {
        dispatch_float(key.y.dtype, [&](auto out) {
          apply_as<Affine, In, typename decltype(out)::type>(key, work, rows, features);
        });
      } else if (inverse_) {
        apply_as<InverseAffine, In, In>(key, work, rows, features);
      } else {
        apply_as<Affine, In, In>(key, work, rows, features);
      }
    });
  }

  template <template <typename> class Map, typename In, typename Out>
  void apply_as(const Key& key, const Work& work, Range rows, Range features) const {
    constexpr bool in_double = std::is_same_v<typename Compute<In>::type, double> ||
                               std::is_same_v<Out, double>;
    using C = std::conditional_t<in_double, double, float>;
    Coefficients<C> k(work.coefficients, work.width());
    k.limit = rule_.limit<C>();
    map_piece<Map, C>(rows_at<const In>(key.x, rows, features),
                      rows_at<Out>(key.y, rows, features), rows.size(), work.group,
                      features.size(), work.fresh_bytes,
                      k + (features.begin - work.first));
  }

  const std::vector<Key>& keys_;
  std::vector<Work> work_;
  Rule rule_;
  bool inverse_;
  Weights weights_{};
  Numbered pieces_;
  Numbered strips_;
};

}  // namespace

void update(const std::vector<Key>& keys, Weights weights, const Rule& rule,
            RunPhases run) {
  Call(keys, /*sums=*/true, rule).update(weights, run);
}

void normalize(const std::vector<Key>& keys, const Rule& rule, RunPhases run) {
  Call(keys, /*sums=*/false, rule).map(run);
}

void denormalize(const std::vector<Key>& keys, const Rule& rule, RunPhases run) {
  Call(keys, /*sums=*/false, rule, /*inverse=*/true).map(run);
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
  const double samples = batch.count.read(batch.count.has_seen ? 1 : 0);
  state.write_count(fold(count, batch_count, weights).count, samples);
}

}  // namespace VECNORM_ISA
}  // namespace cpu
}  // namespace vecnorm

#include "returns.inl"
