// Copyright (c) the torchrl_vecnorm authors.
//
// This source code is licensed under the MIT license found in the
// LICENSE file in the root directory of this source tree.

// Keys to run kernels on, and what they should give, in long double. For cpu_host/ and
// cuda_host/.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "csrc/key.h"
#include "csrc/moments.h"

namespace vecnorm {

inline std::mt19937 random_bits(7);
inline int failures = 0;

// Guarded memory: a write outside of it is found without a sanitizer too. Under
// AddressSanitizer it has no guard but the sanitizer's, which reads are not allowed in.
template <typename T>
class Guarded {
 public:
  explicit Guarded(size_t n, size_t offset = 0) : n_(n), at_(kGuard + offset) {
    bytes_.assign((n + at_) * sizeof(T) + kGuard * sizeof(T), kByte);
    if (n > 0) {
      std::memset(data(), 0, n * sizeof(T));
    }
  }
  T* data() { return reinterpret_cast<T*>(bytes_.data()) + at_; }
  T& operator[](size_t i) { return data()[i]; }
  const std::vector<unsigned char>& bytes() const { return bytes_; }
  bool intact() const {
    for (size_t i = 0; i < bytes_.size(); ++i) {
      const bool inside = i >= at_ * sizeof(T) && i < (at_ + n_) * sizeof(T);
      if (!inside && bytes_[i] != kByte) {
        return false;
      }
    }
    return true;
  }

 private:
#ifdef __SANITIZE_ADDRESS__
  static constexpr size_t kGuard = 0;
#else
  static constexpr size_t kGuard = 64;
#endif
  static constexpr unsigned char kByte = 0xa5;
  size_t n_;
  size_t at_;
  std::vector<unsigned char> bytes_;
};

struct Case {
  std::string name;
  int64_t samples = 0;
  int64_t features = 0;
  Dtype dtype = Dtype::kFloat32;
  int64_t pad = 0;  // elements between rows
  int64_t feature_stride = 1;
  size_t offset = 0;  // of the first element, in elements
  bool masked = false;
  double masked_out = 0;  // added to values that the mask leaves out, the first too
  bool counted = true;    // the state counts finite values, and all samples
  bool float_state = false;
  double spoiled = 0;  // share of values that are not finite
  double loc = 3;
  double scale = 2;
  // How the call normalises.
  EpsMode eps_mode = EpsMode::kStdFloor;
  double eps = 1e-4;
  double clip = std::numeric_limits<double>::infinity();
  bool center = true;

  Rule rule() const { return Rule::of(eps, eps_mode, clip, center); }

  long double scale_of(long double var) const {
    switch (eps_mode) {
      case EpsMode::kStdAdd:
        return std::sqrt(var) + eps;
      case EpsMode::kVarAdd:
        return std::sqrt(var + eps);
      case EpsMode::kVarFloor:
        return std::sqrt(std::max(var, static_cast<long double>(eps)));
      default:
        return std::max(std::sqrt(var), static_cast<long double>(eps));
    }
  }
};

// One key of a case: memory, what the kernels get, and what they should give.
struct Buffers {
  Case c;
  int64_t row_stride;
  Guarded<unsigned char> x;  // of any dtype
  Guarded<unsigned char> y;
  Guarded<bool> mask;
  Guarded<double> sum, ssq, count, nonfinite, central;
  std::vector<long double> want_sum, want_ssq, want_finite, want_left_out;
  long double want_count = 0, want_seen = 0;

  explicit Buffers(const Case& in)
      : c(in),
        row_stride(in.features * in.feature_stride + in.pad),
        x(bytes(in.dtype)),
        y(bytes(out_dtype())),
        mask(in.samples),
        sum(in.features),
        ssq(in.features),
        count(in.counted ? 2 : 1),
        nonfinite(2 * in.features),
        central(in.features),
        want_sum(in.features),
        want_ssq(in.features),
        want_finite(in.features),
        want_left_out(in.features) {}

  Dtype out_dtype() const {
    return c.dtype == Dtype::kFloat64 || c.dtype == Dtype::kFloat16 ||
                   c.dtype == Dtype::kBFloat16
               ? c.dtype
               : Dtype::kFloat32;
  }

  // From the first element to the last.
  size_t bytes(Dtype dtype) const {
    size_t size = 0;
    dispatch_any(dtype,
                 [&](auto type) { size = sizeof(typename decltype(type)::type); });
    const int64_t last =
        (c.samples - 1) * row_stride + (c.features - 1) * c.feature_stride;
    return c.samples > 0 ? (c.offset + static_cast<size_t>(last) + 1) * size : 0;
  }

  Matrix matrix(Guarded<unsigned char>& memory, Dtype dtype) {
    Matrix m;
    m.dtype = dtype;
    m.row_stride = row_stride;
    m.feature_stride = c.feature_stride;
    dispatch_any(dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      m.data = reinterpret_cast<T*>(memory.data()) + c.offset;
    });
    return m;
  }

  double get(Guarded<unsigned char>& memory, Dtype dtype, int64_t r, int64_t f) {
    double value = 0;
    const Matrix m = matrix(memory, dtype);
    dispatch_any(dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      value = load<double>(
          static_cast<T*>(m.data)[r * m.row_stride + f * m.feature_stride]);
    });
    return value;
  }

  void fill() {
    std::normal_distribution<double> normal;
    std::uniform_real_distribution<double> uniform;
    const Matrix m = matrix(x, c.dtype);
    for (int64_t r = 0; r < c.samples; ++r) {
      mask[r] = uniform(random_bits) < 0.4 && (c.masked_out == 0 || r > 2);
      for (int64_t f = 0; f < c.features; ++f) {
        double value = c.loc + c.scale * normal(random_bits) * (1 + f % 3);
        if (uniform(random_bits) < c.spoiled) {
          value = uniform(random_bits) < 0.5 ? std::numeric_limits<double>::quiet_NaN()
                                             : -std::numeric_limits<double>::infinity();
        }
        if (c.masked && !mask[r]) {
          value += c.masked_out;
        }
        dispatch_any(c.dtype, [&](auto type) {
          using T = typename decltype(type)::type;
          const int64_t i = r * m.row_stride + f * m.feature_stride;
          if constexpr (std::is_same_v<T, bool>) {
            static_cast<T*>(m.data)[i] = value > c.loc;
          } else if constexpr (std::is_integral_v<T>) {
            static_cast<T*>(m.data)[i] = static_cast<T>(std::fabs(value) + 1);
          } else {
            static_cast<T*>(m.data)[i] = store<T>(value);
          }
        });
      }
    }
  }

  Key key() {
    Key k;
    k.x = matrix(x, c.dtype);
    k.y = matrix(y, out_dtype());
    k.mask = c.masked ? mask.data() : nullptr;
    const Dtype dtype = c.float_state ? Dtype::kFloat32 : Dtype::kFloat64;
    k.state.sum = {sum.data(), dtype};
    k.state.ssq = {ssq.data(), dtype};
    k.state.count = {count.data(), dtype};
    k.state.nonfinite = {c.counted ? nonfinite.data() : nullptr, dtype};
    k.state.count.has_seen = c.counted;
    k.state.central = {c.counted ? central.data() : nullptr, dtype};
    k.samples = c.samples;
    k.features = c.features;
    return k;
  }

  // The update in long double.
  void expect(long double keep) {
    int64_t n = 0;
    for (int64_t r = 0; r < c.samples; ++r) {
      n += !c.masked || mask[r];
    }
    if (n == 0) {
      return;
    }
    for (int64_t f = 0; f < c.features; ++f) {
      long double s1 = 0;
      long double s2 = 0;
      long double used = 0;
      for (int64_t r = 0; r < c.samples; ++r) {
        const double value = get(x, c.dtype, r, f);
        if ((!c.masked || mask[r]) && std::isfinite(value)) {
          s1 += value;
          s2 += static_cast<long double>(value) * value;
          used += 1;
        }
      }
      if (!c.counted) {
        const long double old = want_count;
        const long double at = old > 0 ? want_sum[f] / old : used > 0 ? s1 / used : 0;
        s1 += (n - used) * at;
        s2 += (n - used) * at * at;
      }
      want_sum[f] = keep * want_sum[f] + s1;
      want_ssq[f] = keep * want_ssq[f] + s2;
      want_finite[f] = keep * want_finite[f] + (c.counted ? used : n);
      want_left_out[f] += n - used;
    }
    want_count = keep * want_count + n;
    want_seen += n;
  }

  double state(Guarded<double>& leaf, int64_t i) {
    return c.float_state ? reinterpret_cast<float*>(leaf.data())[i] : leaf[i];
  }

  void fail(const char* what, int64_t r, int64_t f, double got, double want) {
    if (++failures < 20) {
      std::printf("%s: %s[%ld, %ld]: got %.17g, expected %.17g\n", c.name.c_str(), what,
                  static_cast<long>(r), static_cast<long>(f), got, want);
    }
  }

  void near(const char* what, int64_t r, int64_t f, double got, long double want,
            double tolerance) {
    const bool same = std::isnan(got) == std::isnan(static_cast<double>(want));
    if (!same || std::fabs(got - want) > tolerance * (1 + std::fabs(want))) {
      fail(what, r, f, got, static_cast<double>(want));
    }
  }

  void compare(double exact = 1e-6) {
    exact = c.float_state ? 1e-5 : exact;
    near("count", 0, 0, state(count, 0), want_count, 1e-6);
    if (c.counted) {
      near("seen", 0, 0, state(count, 1), want_seen, 0);
    }
    std::vector<long double> loc(c.features), scale(c.features, 1);
    for (int64_t f = 0; f < c.features; ++f) {
      // A sum of values of either sign is as exact as their size allows.
      const long double size = std::sqrt(want_ssq[f] * want_count);
      near("sum", 0, f, state(sum, f), want_sum[f],
           exact * static_cast<double>(1 + size / (1 + std::fabs(want_sum[f]))));
      near("ssq", 0, f, state(ssq, f), want_ssq[f], exact);
      if (c.counted) {
        near("missing", 0, f, state(nonfinite, f), want_count - want_finite[f],
             c.float_state ? 1e-6 : 1e-12);
        near("left out", 0, f, state(nonfinite, c.features + f), want_left_out[f], 0);
      }
      scale[f] = c.eps_mode == EpsMode::kStdFloor ? 1 : c.scale_of(1);
      if (want_finite[f] > 0) {
        loc[f] = want_sum[f] / want_finite[f];
        const long double var = want_ssq[f] / want_finite[f] - loc[f] * loc[f];
        if (c.counted) {
          near("central", 0, f, state(central, f), var, std::max(exact, 1e-5));
        }
        scale[f] = c.scale_of(std::max(var, 0.0L));
      }
      loc[f] = c.center ? loc[f] : 0;
    }
    const Dtype out = out_dtype();
    const double tolerance = out == Dtype::kBFloat16  ? 2e-2
                             : out == Dtype::kFloat16 ? 2e-3
                             : c.float_state          ? 1e-3
                                                      : 1e-4;
    for (int64_t r = 0; r < c.samples; ++r) {
      for (int64_t f = 0; f < c.features; ++f) {
        const double value = get(x, c.dtype, r, f);
        const double got = get(y, out, r, f);
        if (std::isfinite(value) || (std::isinf(value) && std::isfinite(c.clip))) {
          const long double y = (value - loc[f]) / scale[f];
          const auto clip = static_cast<long double>(c.clip);
          near("y", r, f, got, std::min(std::max(y, -clip), clip), tolerance);
        } else if (std::isfinite(got)) {
          fail("y", r, f, got, value);
        }
      }
    }
    for (bool intact : {x.intact(), y.intact(), sum.intact(), ssq.intact(),
                        count.intact(), nonfinite.intact(), central.intact()}) {
      if (!intact) {
        fail("a write outside of the memory", 0, 0, 0, 0);
      }
    }
  }

  // Has denormalize(key) turn y back into x, where it can.
  template <typename F>
  void compare_back(const F& denormalize) {
    const Dtype out = out_dtype();
    if (c.dtype != out || c.spoiled > 0 || std::isfinite(c.clip)) {
      return;
    }
    Guarded<unsigned char> back(bytes(out));
    Key k = key();
    k.x = matrix(y, out);
    k.y = matrix(back, out);
    denormalize(k);
    const double tolerance = out == Dtype::kBFloat16  ? 5e-2
                             : out == Dtype::kFloat16 ? 5e-3
                                                      : 1e-4;
    for (int64_t r = 0; r < c.samples; ++r) {
      for (int64_t f = 0; f < c.features; ++f) {
        near("x", r, f, get(back, out, r, f), get(x, out, r, f), tolerance);
      }
    }
  }
};

inline Case make(const char* name, int64_t samples, int64_t features,
                 Dtype dtype = Dtype::kFloat32) {
  Case c;
  c.name = std::string(name) + " " + std::to_string(samples) + "x" +
           std::to_string(features) + " dtype " +
           std::to_string(static_cast<int>(dtype));
  c.samples = samples;
  c.features = features;
  c.dtype = dtype;
  return c;
}

// Each place for eps, with a clip that is felt or without centring.
inline std::vector<Case> rules() {
  std::vector<Case> all = {
      make("rule", 70, 16), make("rule", 130, 17, Dtype::kBFloat16),
      make("rule", 70, 24, Dtype::kUInt8), make("rule", 30, 5, Dtype::kFloat64),
      make("rule", 70, 12, Dtype::kFloat16)};
  const EpsMode modes[] = {EpsMode::kStdAdd, EpsMode::kVarAdd, EpsMode::kVarFloor,
                           EpsMode::kStdFloor, EpsMode::kStdAdd};
  for (size_t i = 0; i < all.size(); ++i) {
    all[i].eps_mode = modes[i];
    all[i].eps = i == 2 ? 7 : 0.5;
    all[i].clip = i % 2 == 0 ? 0.75 : all[i].clip;
    all[i].center = i % 2 == 0;
    all[i].spoiled = i == 0 || i == 4 ? 0.1 : 0;
  }
  return all;
}

}  // namespace vecnorm
