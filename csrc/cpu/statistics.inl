// Copyright (c) the torchrl_vecnorm authors.
//
// This source code is licensed under the MIT license found in the
// LICENSE file in the root directory of this source tree.

// The statistics of a strip of features, in two forms: Plain, worked on where they lie,
// and Some, arrays for whatever a state may hold. Loops over either become packs of
// features, where one feature after the other would wait for each division.

namespace vecnorm {
namespace cpu {
namespace VECNORM_ISA {
namespace {

bool any(const double* values, int64_t n) {
  int64_t found = 0;
  for (int64_t i = 0; i < n; ++i) {
    found += values[i] != 0 ? 1 : 0;
  }
  return found > 0;
}

// As they nearly always are: in double, the variance beside the sums, and no value was
// ever left out, so that as many are behind every feature. Nothing is copied, and what
// the features share is known once.
struct Plain {
  double* __restrict sum = nullptr;
  double* __restrict ssq = nullptr;
  double* __restrict var = nullptr;
  bool is_there = false;  // or the rest is nothing
  int64_t size = 0;
  double count = 0;
  double used = 0;
  double per_value = 0;
  Rounding rounding{};

  // Some features of a state, if they are that.
  Plain(const State& s, Range features) {
    for (const Leaf& leaf : {s.sum, s.ssq, s.count, s.central}) {
      if (leaf.data == nullptr || leaf.dtype != Dtype::kFloat64) {
        return;
      }
    }
    size = features.size();
    if (s.nonfinite.data != nullptr && (s.nonfinite.dtype != Dtype::kFloat64 ||
                                        any(at(s.nonfinite, features), size))) {
      return;
    }
    is_there = true;
    sum = at(s.sum, features);
    ssq = at(s.ssq, features);
    var = at(s.central, features);
    rounding = s.rounding();
    set_count(s.count.read(0));
  }

  inline Moments operator[](int64_t i) const {
    return {sum[i], ssq[i], count, 0, var[i], used, per_value};
  }

  // The variance of every feature, as settle() of key.h has it.
  void settle(double* __restrict to) const {
    for (int64_t i = 0; i < size; ++i) {
      to[i] = kept_var(var[i], (*this)[i], rounding);
    }
  }

  // The running means, in the arithmetic of C.
  template <typename C>
  void shifts(double* __restrict to) const {
    for (int64_t i = 0; i < size; ++i) {
      const double near = static_cast<double>(static_cast<C>((*this)[i].near_loc()));
      to[i] = usable(near) ? near : 0.;
    }
  }

  // Takes in a batch that has `samples` values of every feature. `count` in the state
  // stays: others read it. The variances are settled then: they were before, and the
  // sums have taken in the same.
  void fold(const Totals& sums, double samples, const double* __restrict shift,
            Weights w) {
    const double* __restrict d1 = sums.d1;
    const double* __restrict d2 = sums.d2;
    const double per_sample = inverse(samples);
    const double per_both = inverse(w.keep * used + w.weight * samples);
    for (int64_t i = 0; i < size; ++i) {
      Moments m = (*this)[i];
      m.var = kept_var(m.var, m, rounding);
      const Partial p{samples, d1[i], d2[i]};
      m = fold_some(m, unshift(p, per_sample, shift[i], samples), w, per_both);
      sum[i] = m.sum;
      ssq[i] = m.ssq;
      var[i] = m.var;
    }
    set_count(w.keep * count + w.weight * samples);
  }

 private:
  static double* at(const Leaf& leaf, Range features) {
    return static_cast<double*>(leaf.data) + features.begin;
  }

  void set_count(double now) {
    count = now;
    used = Moments::used_of(now, 0);
    per_value = inverse(used);
  }
};

// Of any state.
struct Some {
  int64_t size;
  double count;
  double sum[kStrip];
  double ssq[kStrip];
  double missing[kStrip];
  double var[kStrip];
  double used[kStrip];
  double per_value[kStrip];

  inline Moments operator[](int64_t i) const {
    return {sum[i], ssq[i], count, missing[i], var[i], used[i], per_value[i]};
  }

  inline void set(int64_t i, const Moments& m) {
    sum[i] = m.sum;
    ssq[i] = m.ssq;
    missing[i] = m.missing;
    var[i] = m.var;
  }

  // As settle() of key.h.
  void settle(const State& s) {
    if (any(missing, size)) {
      for (int64_t i = 0; i < size; ++i) {
        used[i] = Moments::used_of(count, missing[i]);
        per_value[i] = inverse(used[i]);
      }
    } else {
      std::fill_n(used, size, Moments::used_of(count, 0));
      std::fill_n(per_value, size, inverse(used[0]));
    }
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
      double before[kStrip];
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

}  // namespace
}  // namespace VECNORM_ISA
}  // namespace cpu
}  // namespace vecnorm
