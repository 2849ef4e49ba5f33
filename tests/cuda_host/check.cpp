// Copyright (c) the torchrl_vecnorm authors.
//
// This source code is licensed under the MIT license found in the
// LICENSE file in the root directory of this source tree.

// The CUDA kernels, run on the host, against sums in long double: all dtypes, strides,
// masks, tails, several keys, values that are not finite, with and without the counter
// of them, each kind of kernel, both orders of blocks and threads. Prints what differs;
// exits with 1 then.

#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "csrc/cuda/kernels.h"

using namespace vecnorm;

namespace {

std::mt19937 random_bits(7);
int failures = 0;

// Guarded memory: a write outside of it is found without a sanitizer too.
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
  static constexpr size_t kGuard = 64;
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
  bool counted = true;  // the state counts finite values
  bool float_state = false;
  double spoiled = 0;  // share of values that are not finite
  double loc = 3;
  double scale = 2;
};

// One key of a case: memory, what the kernels get, and what they should give.
struct Buffers {
  Case c;
  int64_t row_stride;
  Guarded<double> x;  // reused as raw bytes of any dtype
  Guarded<double> y;
  Guarded<bool> mask;
  Guarded<double> sum, ssq, count, nonfinite;
  std::vector<long double> want_sum, want_ssq, want_finite, want_left_out;
  long double want_count = 0;

  explicit Buffers(const Case& in)
      : c(in),
        row_stride(in.features * in.feature_stride + in.pad),
        x(in.samples * row_stride + 8, 0),
        y(in.samples * row_stride + 8, 0),
        mask(in.samples),
        sum(in.features),
        ssq(in.features),
        count(1),
        nonfinite(2 * in.features),
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

  Matrix matrix(Guarded<double>& memory, Dtype dtype) {
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

  double get(Guarded<double>& memory, Dtype dtype, int64_t r, int64_t f) {
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
      mask[r] = uniform(random_bits) < 0.4;
      for (int64_t f = 0; f < c.features; ++f) {
        double value = c.loc + c.scale * normal(random_bits) * (1 + f % 3);
        if (uniform(random_bits) < c.spoiled) {
          value = uniform(random_bits) < 0.5 ? std::numeric_limits<double>::quiet_NaN()
                                             : -std::numeric_limits<double>::infinity();
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
    k.state.sum = sum.data();
    k.state.ssq = ssq.data();
    k.state.count = count.data();
    k.state.nonfinite = c.counted ? nonfinite.data() : nullptr;
    if (c.float_state) {
      k.state.sum_dtype = k.state.ssq_dtype = k.state.count_dtype = Dtype::kFloat32;
    }
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

  void compare(double eps) {
    const double exact = c.float_state ? 1e-5 : 1e-6;
    near("count", 0, 0, state(count, 0), want_count, 1e-6);
    std::vector<long double> loc(c.features), scale(c.features, 1);
    for (int64_t f = 0; f < c.features; ++f) {
      // A sum of values of either sign is as exact as their size allows.
      const long double size = std::sqrt(want_ssq[f] * want_count);
      near("sum", 0, f, state(sum, f), want_sum[f],
           exact * static_cast<double>(1 + size / (1 + std::fabs(want_sum[f]))));
      near("ssq", 0, f, state(ssq, f), want_ssq[f], exact);
      if (c.counted) {
        near("missing", 0, f, nonfinite[f], want_count - want_finite[f], 1e-12);
        near("left out", 0, f, nonfinite[c.features + f], want_left_out[f], 0);
      }
      if (want_finite[f] > 0) {
        loc[f] = want_sum[f] / want_finite[f];
        const long double var = want_ssq[f] / want_finite[f] - loc[f] * loc[f];
        scale[f] =
            std::max(std::sqrt(std::max(var, 0.0L)), static_cast<long double>(eps));
      }
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
        if (std::isfinite(value)) {
          near("y", r, f, got, (value - loc[f]) / scale[f], tolerance);
        } else if (std::isfinite(got)) {
          fail("y", r, f, got, value);
        }
      }
    }
    for (bool intact : {x.intact(), y.intact(), sum.intact(), ssq.intact(),
                        count.intact(), nonfinite.intact()}) {
      if (!intact) {
        fail("a write outside of the memory", 0, 0, 0, 0);
      }
    }
  }
};

// How often each path was taken.
int taken[4];

// The keys of one call; two updates, then the pieces.
void run(const std::vector<Case>& cases, cuda::Path wish) {
  constexpr double keep = 0.9;
  constexpr double eps = 1e-4;
  std::vector<Buffers> all;
  for (const Case& c : cases) {
    all.emplace_back(c);
    all.back().c.name += " path " + std::to_string(static_cast<int>(wish));
  }
  for (int call = 0; call < 2; ++call) {
    std::vector<Key> keys;
    for (Buffers& b : all) {
      b.fill();
      b.expect(keep);
      keys.push_back(b.key());
    }
    cuda::Update update(keys, {keep, 1}, eps, wish);
    const cuda::WorkspaceSize size = update.workspace();
    Guarded<double> partials(size.partials);
    Guarded<unsigned> counters(size.counters);
    for (size_t i = 0; i < size.partials; ++i) {
      partials[i] = std::numeric_limits<double>::quiet_NaN();  // poisoned
    }
    for (size_t i = 0; i < size.counters; ++i) {
      counters[i] = i % 2 == 0 ? 0 : 0x80000000u;  // as barriers may leave them
    }
    if (update.run({partials.data(), counters.data()}, nullptr) != cudaSuccess) {
      std::printf("%s: the launch failed\n", all[0].c.name.c_str());
      ++failures;
    }
    ++taken[static_cast<int>(update.path())];
    for (Buffers& b : all) {
      b.compare(eps);
    }
    for (size_t i = 0; i < size.counters; ++i) {
      if ((counters[i] & 0x7fffffffu) != 0) {
        std::printf("a counter was left at %u\n", counters[i]);
        ++failures;
      }
    }
    if (!partials.intact() || !counters.intact()) {
      std::printf("a write outside of the workspace\n");
      ++failures;
    }
    cuda::normalize(keys, eps, nullptr);
    for (Buffers& b : all) {
      b.compare(eps);
    }
  }
  // The inverse gives back what was normalised.
  for (Buffers& b : all) {
    const Dtype out = b.out_dtype();
    if (b.c.dtype == out && b.c.spoiled == 0) {
      Key k = b.key();
      Guarded<double> back(b.c.samples * b.row_stride + 8, 0);
      k.x = b.matrix(b.y, out);
      k.y = b.matrix(back, out);
      cuda::denormalize({k}, eps, nullptr);
      const double tolerance = out == Dtype::kBFloat16  ? 5e-2
                               : out == Dtype::kFloat16 ? 5e-3
                                                        : 1e-4;
      for (int64_t r = 0; r < b.c.samples; ++r) {
        for (int64_t f = 0; f < b.c.features; ++f) {
          b.near("x", r, f, b.get(back, out, r, f), b.get(b.x, out, r, f), tolerance);
        }
      }
    }
  }
}

Case make(const char* name, int64_t samples, int64_t features,
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

std::vector<std::vector<Case>> calls(const std::string& extent) {
  const bool small = !extent.empty();
  std::vector<std::vector<Case>> all;
  const auto one = [&](Case c) { all.push_back({c}); };
  if (extent == "few") {  // threads are slow: one of each kind
    one(make("shape", 70, 3));
    one(make("shape", 40, 72));
    one(make("shape", 700, 16));
    one(make("dtype", 70, 16, Dtype::kBFloat16));
    one(make("dtype", 30, 5, Dtype::kInt32));
    Case c = make("masked", 70, 3);
    c.masked = true;
    c.counted = false;
    one(c);
    c = make("spoiled", 130, 8);
    c.spoiled = 0.1;
    one(c);
    return all;
  }
  std::vector<std::pair<int64_t, int64_t>> shapes = {
      {1, 1}, {5, 3}, {33, 64}, {70, 129}, {600, 1}};
  if (!small) {
    shapes.insert(shapes.end(), {{2, 300},
                                 {129, 3},
                                 {1134, 17},
                                 {300, 68},
                                 {4097, 8},
                                 {3, 1},
                                 {20000, 1},
                                 {9000, 16},
                                 {700, 235},
                                 {40, 1000}});
  }
  for (const auto& [n, f] : shapes) {
    one(make("shape", n, f));
  }
  for (Dtype d :
       {Dtype::kFloat64, Dtype::kFloat16, Dtype::kBFloat16, Dtype::kInt8, Dtype::kInt16,
        Dtype::kInt32, Dtype::kInt64, Dtype::kUInt8, Dtype::kBool}) {
    one(make("dtype", 130, 24, d));
    if (!small) {
      one(make("dtype", 131, 5, d));
    }
  }
  Case c = make("padded", 70, 8);
  c.pad = 4;
  one(c);
  c.name = "misaligned rows";
  c.pad = 3;
  one(c);
  c = make("misaligned start", 70, 8);
  c.offset = 1;
  one(c);
  c = make("strided features", 70, 9);
  c.feature_stride = 2;
  one(c);
  for (int64_t f : {1, 3, 64}) {
    c = make("masked", 700, f);
    c.masked = true;
    one(c);
    c.spoiled = 0.05;
    c.counted = false;
    c.name += " spoiled, no counter";
    one(c);
  }
  for (int64_t f : {1, 3, 64, 100}) {
    c = make("spoiled", 300, f);
    c.spoiled = 0.1;
    one(c);
  }
  c = make("float state", 300, 12);
  c.float_state = true;
  c.counted = false;
  one(c);
  c = make("far from zero", 500, 12);
  c.loc = 1e4;
  c.scale = 1;
  one(c);
  c = make("end of the range", 130, 24);  // x - loc overflows, and some values do
  c.loc = -1.5e38;
  c.scale = 7e37;
  c.spoiled = 0.01;
  one(c);
  std::vector<Case> many;
  for (int k = 0; k < (small ? 5 : 33); ++k) {
    many.push_back(make("one of many", 20 + 13 * k, 1 + k * 7 % 70,
                        k % 3 == 1 ? Dtype::kBFloat16 : Dtype::kFloat32));
    many.back().masked = k % 4 == 2;
  }
  many.push_back(make("no samples", 0, 3));
  all.push_back(many);
  return all;
}

}  // namespace

int main(int argc, char** argv) {
  using cuda::Path;
  const std::string extent = argc > 1 ? argv[1] : "";  // "small", "few" or all
  const bool quick = extent == "few";
  emulation::uneven = quick;
#ifdef VECNORM_HOST_THREADS
  const std::vector<bool> orders = {false};  // threads have none
#else
  const std::vector<bool> orders = {false, true};
#endif
  for (bool descending : orders) {
    if (descending && extent == "small") {
      break;  // for sanitizers, which are slow
    }
    emulation::descending = descending;
    for (const auto& call : calls(extent)) {
      if (descending && call[0].samples * call[0].features > 10000) {
        continue;  // once is slow enough
      }
      for (Path wish : {Path::kTwoKernels, Path::kCluster, Path::kResident}) {
        emulation::device = 0;
        run(call, wish);
        if (quick && failures > 0) {
          std::printf("%d differences\n", failures);
          return 1;
        }
        // More memory changes what happens to what does not fit into less.
        if (!quick && (call[0].features > 64 || call[0].samples > 500)) {
          emulation::device = 1;
          run(call, wish);
        }
      }
      if (extent.empty() && !descending) {
        run(call, Path::kAuto);
        emulation::device = 3;
        emulation::busy = true;
        run(call, Path::kResident);
        run(call, Path::kCluster);
        emulation::busy = false;
        emulation::device = 2;
        run(call, Path::kAuto);
      }
    }
  }
  std::printf("paths taken: %d clusters, %d resident, %d two kernels\n", taken[1],
              taken[2], taken[3]);
  std::printf("%d differences\n", failures);
  return failures == 0 ? 0 : 1;
}
