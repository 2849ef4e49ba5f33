// Copyright (c) the torchrl_vecnorm authors.
//
// This source code is licensed under the MIT license found in the
// LICENSE file in the root directory of this source tree.

// Rewards over the deviation of discounted returns:
//
//   1. step    chunks of rows: the returns go on by a step, and are summed, in double
//              from the start
//   2. finish  the chunks are combined in order, and folded into the state
//   3. scale   y = r / scale, clipped
//
// Rewards are few beside observations: of one feature or of some, which are walked one
// after the other.

namespace vecnorm {
namespace cpu {
namespace VECNORM_ISA {
namespace {

#include "../step_return.inl"

// Rows of a chunk. A function of nothing: results are the same on any team.
constexpr int64_t kReturnRows = 4096;
// Rows that are converted at a time, and stay in the L1 cache.
constexpr int64_t kReturnBlock = 256;
// Packs whose sums do not wait for each other.
constexpr int64_t kReturnPacks = 4;

typedef int64_t Flags __attribute__((vector_size(kPackBytes)));

inline Flags load_flags(const int64_t* at) {
  Flags flags;
  std::memcpy(&flags, at, sizeof(flags));
  return flags != 0;
}

struct InDouble {
  template <typename T>
  inline T operator()(T x) const {
    return x;
  }
};

struct InFloat {
  inline double operator()(double x) const { return static_cast<float>(x); }
  inline Pack<double> operator()(Pack<double> x) const {
    for (int64_t j = 0; j < kPack<double>; ++j) {
      x[j] = static_cast<float>(x[j]);
    }
    return x;
  }
};

inline Partial& operator+=(Partial& a, const Partial& b) { return a = combine(a, b); }

// Some rows of one feature. Converted by loops that do nothing else, which compilers
// turn into packs.
struct Block {
  double reward[kReturnBlock];
  int64_t done[kReturnBlock];
  int64_t counts[kReturnBlock];
};

// The returns of a block go on, to `left`, and are summed as if all rewards were
// finite: in a third of the time that it takes to ask each. If one was not, or has no
// square, the sums say so (n is 0 then), and all has to be done again.
template <bool kClearsBefore>
Partial step_finite_rows(const Block& block, const double* returns, double* left,
                         int64_t rows, double shift, double gamma) {
  constexpr int64_t kRows = kReturnPacks * kPack<double>;
  Pack<double> d1[kReturnPacks] = {};
  Pack<double> d2[kReturnPacks] = {};
  const Pack<double> zero{};
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows) {
    for (int64_t p = 0; p < kReturnPacks; ++p) {
      const int64_t i = r + p * kPack<double>;
      const Flags done = load_flags(block.done + i);
      const Pack<double> past = load_pack<double>(returns + i) * gamma;
      const Pack<double> value = (kClearsBefore ? (done ? zero : past) : past) +
                                 load_pack<double>(block.reward + i);
      store_pack<double>(left + i, kClearsBefore ? value : (done ? zero : value));
      const Pack<double> d = value - shift;
      d1[p] += d;
      d2[p] += d * d;
    }
  }
  Partial total;
  for (; r < rows; ++r) {
    const bool done = block.done[r] != 0;
    const double past = returns[r] * gamma;
    const double value = (kClearsBefore && done ? 0. : past) + block.reward[r];
    left[r] = !kClearsBefore && done ? 0. : value;
    const double d = value - shift;
    total.d1 += d;
    total.d2 += d * d;
  }
  for (int64_t p = 0; p < kReturnPacks; ++p) {
    for (int64_t j = 0; j < kPack<double>; ++j) {
      total += {0, d1[p][j], d2[p][j]};
    }
  }
  // Far below what usable() asks for, whatever the shift.
  total.n =
      std::fabs(shift) <= 1e140 && total.d2 <= 1e280 ? static_cast<double>(rows) : 0.;
  return total;
}

// The same with each row asked: whether it counts, and whether it can be summed.
template <typename Round, bool kMasked>
Partial step_rows(const Block& block, double* returns, int64_t rows, double shift,
                  Discount by) {
  constexpr int64_t kRows = kReturnPacks * kPack<double>;
  Sums<double, Pack<double>> sums[kReturnPacks];
  const Pack<double> shifts = Pack<double>{} + shift;
  const Flags all = Flags{} == 0;
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows) {
    for (int64_t p = 0; p < kReturnPacks; ++p) {
      const int64_t i = r + p * kPack<double>;
      const ReturnStep<Pack<double>> step =
          step_return(load_pack<double>(returns + i),
                      load_pack<double>(block.reward + i), load_flags(block.done + i),
                      kMasked ? load_flags(block.counts + i) : all, by, Round());
      store_pack<double>(returns + i, step.left);
      sums[p].add(step.seen, shifts);
    }
  }
  Partial total;
  for (; r < rows; ++r) {
    const ReturnStep<double> step =
        step_return(returns[r], block.reward[r], block.done[r] != 0,
                    !kMasked || block.counts[r] != 0, by, Round());
    returns[r] = step.left;
    total = reduce(total, step.seen, shift);
  }
  for (const Sums<double, Pack<double>>& s : sums) {
    for (int64_t j = 0; j < kPack<double>; ++j) {
      total += {s.n.value[j], s.d1[j], s.d2[j]};
    }
  }
  return total;
}

class ScaleReturns {
 public:
  ScaleReturns(const Returns& of, Discount by, Weights weights, const Rule& rule)
      : of_(of),
        key_(of.key),
        by_(by),
        weights_(weights),
        rule_(rule),
        chunks_(ceil_div(key_.samples, kReturnRows)),
        shifts_(key_.features),
        partials_(chunks_ * key_.features),
        counted_(chunks_),
        statistics_(key_.features) {}

  void run(RunPhases run) {
    for (int64_t f = 0; f < key_.features; ++f) {
      shifts_[f] = shift_of_returns(key_, f, first_reward(f), weights_);
    }
    const Phase step{chunks_, [this](int64_t begin, int64_t end) {
                       for (int64_t c = begin; c < end; ++c) {
                         this->step(c);
                       }
                     }};
    const Phase finish{1, [this](int64_t begin, int64_t end) {
                         if (begin < end) {
                           this->finish();
                         }
                       }};
    const Phase scale{chunks_, [this](int64_t begin, int64_t end) {
                        for (int64_t c = end - 1; c >= begin; --c) {
                          this->scale(c);
                        }
                      }};
    const std::vector<Phase> phases{step, finish, scale};
    const int64_t values = key_.samples * key_.features;
    if (values >= kSerialValues) {
      return run(phases, values);
    }
    for (const Phase& phase : phases) {
      phase.body(0, phase.parts);
    }
  }

 private:
  Range rows_of_chunk(int64_t chunk) const {
    return {chunk * kReturnRows, std::min((chunk + 1) * kReturnRows, key_.samples)};
  }

  double first_reward(int64_t f) const {
    double reward = 0;
    dispatch_any(key_.x.dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      reward =
          load<double>(static_cast<const T*>(key_.x.data)[f * key_.x.feature_stride]);
    });
    return reward;
  }

  void step(int64_t chunk) {
    const Range rows = rows_of_chunk(chunk);
    const bool* mask = key_.mask;
    counted_[chunk] = static_cast<double>(
        mask != nullptr ? std::count(mask + rows.begin, mask + rows.end, true)
                        : rows.size());
    for (int64_t f = 0; f < key_.features; ++f) {
      for (int64_t at = rows.begin; at < rows.end; at += kReturnBlock) {
        const Range block{at, std::min(at + kReturnBlock, rows.end)};
        partials_[chunk * key_.features + f] +=
            of_.returns.dtype == Dtype::kFloat64
                ? step_block<double, InDouble>(block, f)
                : step_block<float, InFloat>(block, f);
      }
    }
  }

  template <typename G, typename Round>
  Partial step_block(Range rows, int64_t f) const {
    const int64_t n = rows.size();
    Block block;
    dispatch_any(key_.x.dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      const T* from = static_cast<const T*>(key_.x.data) +
                      rows.begin * key_.x.row_stride + f * key_.x.feature_stride;
      convert(from, key_.x.row_stride, n, block.reward);
    });
    convert(bytes(of_.done + rows.begin), 1, n, block.done);
    if (key_.mask != nullptr) {
      convert(bytes(key_.mask + rows.begin), 1, n, block.counts);
    }
    const auto step = [&](double* returns) {
      if (std::is_same_v<Round, InDouble> && key_.mask == nullptr) {
        double left[kReturnBlock];
        const auto step_finite =
            by_.clears_before ? step_finite_rows<true> : step_finite_rows<false>;
        const Partial sums =
            step_finite(block, returns, left, n, shifts_[f], by_.gamma);
        if (sums.n > 0) {
          std::copy_n(left, n, returns);
          return sums;
        }
      }
      return key_.mask != nullptr
                 ? step_rows<Round, true>(block, returns, n, shifts_[f], by_)
                 : step_rows<Round, false>(block, returns, n, shifts_[f], by_);
    };
    G* const returns =
        static_cast<G*>(of_.returns.data) + rows.begin * key_.features + f;
    if constexpr (std::is_same_v<G, double>) {
      if (key_.features == 1) {
        return step(returns);
      }
    }
    double wide[kReturnBlock];
    convert(returns, key_.features, n, wide);
    const Partial sums = step(wide);
    for (int64_t r = 0; r < n; ++r) {
      returns[r * key_.features] = static_cast<G>(wide[r]);
    }
    return sums;
  }

  // Loops over bools do not become packs.
  static const uint8_t* bytes(const bool* flags) {
    return reinterpret_cast<const uint8_t*>(flags);
  }

  template <typename T, typename C>
  static void convert(const T* from, int64_t stride, int64_t rows, C* to) {
    if (stride == 1) {
      for (int64_t r = 0; r < rows; ++r) {
        to[r] = load<C>(from[r]);
      }
      return;
    }
    for (int64_t r = 0; r < rows; ++r) {
      to[r] = load<C>(from[r * stride]);
    }
  }

  void finish() {
    double samples = 0;
    for (double counted : counted_) {
      samples += counted;
    }
    for (int64_t f = 0; f < key_.features; ++f) {
      Partial sums;
      for (int64_t c = 0; c < chunks_; ++c) {
        sums += partials_[c * key_.features + f];
      }
      const Moments state =
          fold_sums(key_.state, f, key_.features, sums, shifts_[f], samples, weights_);
      statistics_[f] = statistic(state, rule_.scaling, key_.state.rounding());
    }
    fold_count(key_.state, samples, weights_);
  }

  void scale(int64_t chunk) const {
    if (key_.y.data == nullptr) {
      return;
    }
    const Range rows = rows_of_chunk(chunk);
    dispatch_any(key_.x.dtype, [&](auto in) {
      using In = typename decltype(in)::type;
      if constexpr (std::is_integral_v<In>) {
        dispatch_float(key_.y.dtype, [&](auto out) {
          scale_as<In, typename decltype(out)::type>(rows);
        });
      } else {
        scale_as<In, In>(rows);
      }
    });
  }

  template <typename In, typename Out>
  void scale_as(Range rows) const {
    constexpr bool in_double = std::is_same_v<typename Compute<In>::type, double> ||
                               std::is_same_v<Out, double>;
    using C = std::conditional_t<in_double, double, float>;
    const C limit = rule_.limit<C>();
    const Matrix& x = key_.x;
    const Matrix& y = key_.y;
    for (int64_t f = 0; f < key_.features; ++f) {
      const auto map = Affine<C>::of(statistics_[f]);
      const In* from = static_cast<const In*>(x.data) + rows.begin * x.row_stride +
                       f * x.feature_stride;
      Out* to =
          static_cast<Out*>(y.data) + rows.begin * y.row_stride + f * y.feature_stride;
      const auto scale = [&](int64_t at, int64_t out) {
        to[out] = store<Out>(map(load<C>(from[at]), limit));
      };
      if (x.row_stride == 1 && y.row_stride == 1) {
        for (int64_t r = 0; r < rows.size(); ++r) {
          scale(r, r);
        }
      } else {
        for (int64_t r = 0; r < rows.size(); ++r) {
          scale(r * x.row_stride, r * y.row_stride);
        }
      }
    }
  }

  const Returns& of_;
  const Key& key_;
  Discount by_;
  Weights weights_;
  Rule rule_;
  int64_t chunks_;
  std::vector<double> shifts_;
  std::vector<Partial> partials_;
  std::vector<double> counted_;
  std::vector<Statistic> statistics_;
};

}  // namespace

void scale_returns(const Returns& of, Discount by, Weights weights, const Rule& rule,
                   RunPhases run) {
  if (of.key.samples > 0 && of.key.features > 0) {
    ScaleReturns(of, by, weights, rule).run(run);
  }
}

}  // namespace VECNORM_ISA
}  // namespace cpu
}  // namespace vecnorm
