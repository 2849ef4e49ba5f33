// Copyright (c) the torchrl_vecnorm authors.
//
// This source code is licensed under the MIT license found in the
// LICENSE file in the root directory of this source tree.

// The arithmetic of the running normaliser, one feature at a time.
//
// A call goes through four steps, and this header is all of their arithmetic:
//
//   reduce     every value of a feature is taken relative to a shift (the running
//              mean, or the first sample) and added to n, Σd and Σd², d = x - shift
//   combine    partial results of one feature are added, in a fixed order
//   fold       old moments are multiplied by `keep`, the batch's by `weight`
//   statistic  moments -> loc, scale; Affine -> (x - loc) / scale, clipped
//
// The shift is what makes float accumulation safe: with mean/std = 1e5 the squares
// of raw float32 values have no digit left for the variance, the squares of
// deviations have nearly all of them. Shifted sums of one feature always share the
// same shift, so that combining them is plain addition (the shifted-data form of
// Chan, Golub & LeVeque, "Algorithms for Computing the Sample Variance", 1983).
//
// No torch header is included here: plain C++ compilers and nvcc alone read it.

#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#if defined(__CUDACC__) || defined(__HIPCC__)
#define VECNORM_HD __host__ __device__ __forceinline__
#else
#define VECNORM_HD inline
#endif

namespace vecnorm {

template <typename T>
constexpr T kLargest = std::numeric_limits<T>::max();

// What one batch, or a part of it, says about one feature.
struct Partial {
  double n = 0;   // values used
  double d1 = 0;  // Σ (x - shift)
  double d2 = 0;  // Σ (x - shift)²
};

// 1 / n; 0 where there is nothing to divide by. Without a branch, so that compilers
// take several features at once; and so are the functions below.
VECNORM_HD double inverse(double n) {
  const double q = 1. / (n > 0 ? n : 1.);
  return n > 0 ? q : 0.;
}

// Written so that a NaN stays one: fmax would hide it.
VECNORM_HD double not_negative(double x) { return x < 0 ? 0. : x; }

// The running moments of one feature. `count` is the number of samples (shared by
// the features of a key), `missing` the number of values among them that were left out.
// `var` is the variance of the others: where a state keeps it beside the sums it has
// all its digits, else it is the small difference of large numbers that the sums leave.
struct Moments {
  double sum = 0;
  double ssq = 0;
  double count = 0;
  double missing = 0;
  double var = 0;
  // How many values are behind the sums, and its inverse: of most features the same.
  double used = 0;
  double per_value = 0;

  // More values missing than there are samples says that somebody has updated the
  // others without knowing of `missing`.
  VECNORM_HD static double used_of(double count, double missing) {
    const double n = count - missing;
    const double rounding = 1e-9 * count;
    const double known = n <= rounding ? 0. : n;
    return n < -rounding ? count : known;
  }

  VECNORM_HD void weigh() {
    used = used_of(count, missing);
    per_value = inverse(used);
  }

  // To a rounding, without a division.
  VECNORM_HD double near_loc() const { return sum * per_value; }

  VECNORM_HD double loc() const {
    const double mean = sum / (used > 0 ? used : 1.);
    return used > 0 ? mean : 0.;
  }

  // The same without a division, which is what packs of features wait for: as it has
  // it, where a product and a sum are rounded once (Markstein 1990), and to one unit of
  // the last place elsewhere. On a GPU it takes registers that kernels do not have.
  VECNORM_HD double corrected_loc() const {
    const double near = near_loc();
    const double mean = near + (sum - near * used) * per_value;
    return used > 0 ? mean : 0.;
  }

  // The variance as the sums have it.
  VECNORM_HD double var_of_sums() const {
    const double mean = near_loc();
    return not_negative(ssq * per_value - mean * mean);
  }
};

// What rounding leaves of statistics that are far from zero, by what holds them:
// relative to loc², how far their sums may be off the variance that is kept beside
// them, and relative to |loc|, below which a scale is nothing but rounding.
struct Rounding {
  double var;
  double scale;

  VECNORM_HD static Rounding of(bool in_double, bool keeps_var) {
    if (keeps_var) {
      return in_double ? Rounding{1e-9, 7e-15} : Rounding{1e-3, 3e-5};
    }
    return in_double ? Rounding{0, 3e-8} : Rounding{0, 7e-4};
  }
};

// The variance that is kept beside the sums, unless they contradict it: then somebody
// has updated them without knowing of it.
VECNORM_HD double kept_var(double kept, const Moments& m, Rounding rounding) {
  const double from_sums = m.var_of_sums();
  const double loc = m.near_loc();
  const double slack = 1e-6 * (kept + from_sums) + rounding.var * loc * loc;
  return std::fabs(kept - from_sums) <= slack ? kept : from_sums;
}

struct Statistic {
  double loc;
  double scale;
};

// A decay once a call is {decay, 1}; other schedules are other numbers.
struct Weights {
  double keep;    // multiplies the old moments
  double weight;  // what a new sample weighs
};

// Where eps stands; libraries differ.
enum class EpsMode {
  kStdFloor,  // max(std, eps)
  kStdAdd,    // std + eps
  kVarAdd,    // sqrt(var + eps)
  kVarFloor,  // sqrt(max(var, eps))
};

// Every mode is the same formula with other numbers:
//
//   scale = max(sqrt(max(var, least_var) + add_var), least_std) + add_std
struct Scaling {
  double least_var;
  double add_var;
  double least_std;
  double add_std;
  double unseen;     // the scale while nothing was seen: of a deviation of 1
  double centering;  // 1, or 0 where values are only scaled

  VECNORM_HD double widened(double var) const {
    return (var < least_var ? least_var : var) + add_var;  // a NaN stays one
  }
};

// How a call normalises: y = (x - loc) / scale, within [-clip, clip].
struct Rule {
  Scaling scaling{};
  double clip = std::numeric_limits<double>::infinity();
  float float_clip = std::numeric_limits<float>::infinity();

  static Rule of(double eps, EpsMode mode = EpsMode::kStdFloor,
                 double clip = std::numeric_limits<double>::infinity(),
                 bool center = true) {
    double unseen = 1;
    if (mode == EpsMode::kStdAdd) {
      unseen = 1 + eps;
    } else if (mode == EpsMode::kVarAdd) {
      unseen = std::sqrt(1 + eps);
    } else if (mode == EpsMode::kVarFloor) {
      unseen = std::sqrt(eps > 1 ? eps : 1.);
    }
    Rule rule;
    rule.scaling = {mode == EpsMode::kVarFloor ? eps : 0.,
                    mode == EpsMode::kVarAdd ? eps : 0.,
                    mode == EpsMode::kStdFloor ? eps : 0.,
                    mode == EpsMode::kStdAdd ? eps : 0.,
                    unseen,
                    center ? 1. : 0.};
    rule.clip = clip;
    if (clip < static_cast<double>(kLargest<float>)) {
      rule.float_clip = static_cast<float>(clip);
    }
    return rule;
  }

  // The clip in the arithmetic of T.
  template <typename T>
  VECNORM_HD T limit() const {
    return sizeof(T) == sizeof(float) ? static_cast<T>(float_clip)
                                      : static_cast<T>(clip);
  }
};

// A value is left out when it is not finite, or so large that sums of its square would
// not be: beyond 1e145. Finite float32, float16, bfloat16 and integers never are.
VECNORM_HD bool usable(double x) {
  return x * x <= 1e290;  // false for NaN too
}

// Whether double sums that took every value took none that is not usable: none lies
// further from the shift than the root of Σd².
VECNORM_HD bool all_usable(double d2, double shift) {
  return d2 + shift * shift <= 1e289;
}

VECNORM_HD Partial reduce(Partial p, double x, double shift) {
  if (usable(x)) {
    const double d = x - shift;
    p.n += 1;
    p.d1 += d;
    p.d2 += d * d;
  }
  return p;
}

VECNORM_HD Partial combine(Partial a, Partial b) {
  return {a.n + b.n, a.d1 + b.d1, a.d2 + b.d2};
}

// Whether the old moments keep so much weight beside a batch of `samples` that the
// spread between the two means is part of the new variance.
VECNORM_HD bool anchored(double used, double samples, Weights w) {
  return w.keep * used >= 0.01 * w.weight * samples;
}

// Whether float sums over n values can be trusted, or the values have to be summed
// again in double. They cannot when a value was not finite, when a square over- or
// underflowed, nor when the shift lies so far from the values (|mean d| > 8 standard
// deviations) that the variance is a small difference of large sums. That does not
// matter where the shift is the mean of moments that stay: the new variance is then of
// the size of the sums.
VECNORM_HD bool trustworthy(double n, double d1, double d2, bool is_anchored) {
  if (d1 == 0 && d2 == 0) {
    return true;
  }
  return d2 <= kLargest<float> && d2 >= 1e-30 * n &&
         (is_anchored || 65. * d1 * d1 <= 64. * n * d2);
}

// Moments around zero of a batch that was summed around `shift`; `per_value` is 1 /
// p.n.
VECNORM_HD Moments unshift(Partial p, double per_value, double shift, double samples) {
  Moments m;
  m.sum = p.d1 + p.n * shift;
  m.ssq = p.d2 + shift * (2 * p.d1 + p.n * shift);
  m.count = samples;
  m.missing = samples - p.n;
  m.used = p.n;
  m.per_value = per_value;
  const double mean = p.d1 * per_value;
  m.var = not_negative(p.d2 * per_value - mean * mean);
  return m;
}

VECNORM_HD Moments unshift(Partial p, double shift, double samples) {
  return unshift(p, inverse(p.n), shift, samples);
}

// The inverse: n values of this sum and variance, as if summed around `shift`.
VECNORM_HD Partial shifted(double n, double sum, double var, double shift) {
  const double d1 = sum - n * shift;
  return {n, d1, var * n + d1 * d1 * inverse(n)};
}

// The moments of the state and of a batch that has samples, but for how many values are
// behind them; `per_both` is the inverse of that.
VECNORM_HD Moments fold_some(Moments state, const Moments& batch, Weights w,
                             double per_both) {
  // The variance within both, and that between their means (Chan, Golub & LeVeque).
  const double a = w.keep * state.used;
  const double b = w.weight * batch.used;
  const double share = b * per_both;
  const double between = batch.near_loc() - state.near_loc();
  // Neither is negative. Two comparisons would be a branch, which no pack can take.
  const double apart = a * b > 0 ? between : 0.;
  state.var += share * (batch.var - state.var + (1. - share) * apart * apart);
  state.sum = w.keep * state.sum + w.weight * batch.sum;
  state.ssq = w.keep * state.ssq + w.weight * batch.ssq;
  state.count = w.keep * state.count + w.weight * batch.count;
  state.missing = w.keep * state.missing + w.weight * batch.missing;
  return state;
}

// An empty batch changes nothing: it does not even decay.
VECNORM_HD Moments fold(const Moments& state, const Moments& batch, Weights w) {
  if (!(batch.count > 0)) {
    return state;
  }
  const double both = w.keep * state.used + w.weight * batch.used;
  Moments folded = fold_some(state, batch, w, inverse(both));
  folded.weigh();
  return folded;
}

// A state without a counter of missing values cannot leave a value out: it is taken to
// have been at the running mean, or at the batch's mean when there is none yet.
VECNORM_HD Moments impute(Moments batch, const Moments& state) {
  if (batch.missing > 0) {
    Moments stand_ins;
    const double n = batch.missing;
    const double at = state.count > 0 ? state.sum / state.count : batch.loc();
    stand_ins.sum = n * at;
    stand_ins.ssq = n * at * at;
    stand_ins.count = n;
    stand_ins.weigh();
    batch.count -= n;
    batch.missing = 0;
    batch = fold(batch, stand_ins, {1, 1});
    if (!(batch.count > 0)) {
      return stand_ins;
    }
  }
  return batch;
}

// loc and scale of a feature; `root` is that of its variance, widened.
VECNORM_HD Statistic statistic(const Moments& m, double loc, double root,
                               const Scaling& s, Rounding rounding) {
  const double least = std::fabs(loc) * rounding.scale;
  const double bound = least > s.least_std ? least : s.least_std;
  const double scale = (root < bound ? bound : root) + s.add_std;  // a NaN stays one
  return {s.centering * loc, m.used > 0 ? scale : s.unseen};
}

VECNORM_HD Statistic statistic(const Moments& m, const Scaling& s, Rounding rounding) {
  return statistic(m, m.loc(), std::sqrt(s.widened(m.var)), s, rounding);
}

// A normalised value within its limits; a NaN stays one.
template <typename T>
VECNORM_HD T clipped(T y, T limit) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  // Two instructions with a constant operand each; comparisons would need registers.
  if constexpr (sizeof(T) == sizeof(float)) {
    asm("max.NaN.f32 %0, %0, %1;" : "+f"(y) : "f"(-limit));
    asm("min.NaN.f32 %0, %0, %1;" : "+f"(y) : "f"(limit));
    return y;
  }
#endif
  const T low = y < -limit ? -limit : y;
  return low > limit ? limit : low;
}

// The three numbers of a map, before they are rounded to its arithmetic.
struct MapNumbers {
  double a;
  double b;
  double c;
};

// y = (x - loc) / scale in the arithmetic of T. loc is split into a part that T can
// hold and the rest: a mean rounded to float costs 4e-3 at mean/std = 1e5.
template <typename T>
struct Affine {
  T hi;
  T inv;
  T rest;

  VECNORM_HD static MapNumbers wide(Statistic s) {
    const double rounded = static_cast<double>(static_cast<T>(s.loc));
    constexpr double largest = kLargest<T>;
    const double reciprocal = 1. / s.scale;
    // Deviations this large are near the end of T's range: x - hi may overflow where y
    // is an ordinary number. The mean is taken away last, which costs no digits that
    // matter, since it is less than 4096 deviations.
    const double hi = s.scale > largest / 4096 ? 0. : rounded;
    // Clamped, so that a constant feature under a tiny eps gives 0 and not 0 * inf.
    const double inv = reciprocal > largest ? largest : reciprocal;
    return {hi, inv, (hi - s.loc) * reciprocal};
  }

  VECNORM_HD static Affine of(Statistic s) {
    const MapNumbers k = wide(s);
    return {static_cast<T>(k.a), static_cast<T>(k.b), static_cast<T>(k.c)};
  }

  VECNORM_HD T operator()(T x, T limit) const {
    return clipped((x - hi) * inv + rest, limit);
  }
};

// x = y * scale + loc, the inverse of the above: of a y that could have come from
// there.
template <typename T>
struct InverseAffine {
  T scale;
  T hi;
  T lo;

  VECNORM_HD static MapNumbers wide(Statistic s) {
    const double rounded = static_cast<double>(static_cast<T>(s.loc));
    return {s.scale, rounded, s.loc - rounded};
  }

  VECNORM_HD static InverseAffine of(Statistic s) {
    const MapNumbers k = wide(s);
    return {static_cast<T>(k.a), static_cast<T>(k.b), static_cast<T>(k.c)};
  }

  VECNORM_HD T operator()(T y, T limit) const {
    return (clipped(y, limit) * scale + lo) + hi;
  }
};

}  // namespace vecnorm
