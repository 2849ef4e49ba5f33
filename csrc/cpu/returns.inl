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
// Rows that are converted at a time, where rewards or returns are not dense doubles or
// floats. Whole groups of packs, so that sums are the same.
constexpr int64_t kReturnBlock = 256;
// Packs whose sums do not wait for each other.
constexpr int64_t kReturnPacks = 4;

typedef int64_t Flags __attribute__((vector_size(kPackBytes)));

inline Flags load_flags(const uint8_t* at) {
  Flags flags;
  widen(at, reinterpret_cast<int64_t*>(&flags));
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

// Some rows of one feature, dense. `counts` is null where all do.
template <typename T>
struct RewardRows {
  const T* reward;
  const uint8_t* done;
  const uint8_t* counts;
  double* returns;
  int64_t size;
};

// The sums of a feature's rows in a chunk: those in packs, and those at the end.
struct ReturnSums {
  Sums<Pack<double>, true> packs[kReturnPacks];
  Partial rest;

  Partial total() const {
    Partial all = rest;
    for (const Sums<Pack<double>, true>& s : packs) {
      for (int64_t j = 0; j < kPack<double>; ++j) {
        all += {s.n.value[j], s.d1[j], s.d2[j]};
      }
    }
    return all;
  }
};

// Rows that are looked at together.
constexpr int64_t kReturnGroup = kReturnPacks * kPack<double>;

// From row r on the returns go on, and are summed, group by group, as if all of them
// could be: in a third of the time that it takes to ask each. Up to a group where one
// is not finite, or has no square, which the sums say; nothing has happened to that.
template <bool kClearsBefore, typename T>
int64_t step_usable(const RewardRows<T>& rows, int64_t r, Pack<double> shift,
                    double gamma, Sums<Pack<double>, true>* sums) {
  const Pack<double> zero{};
  Pack<double> d1[kReturnPacks];
  Pack<double> d2[kReturnPacks];
  for (int64_t p = 0; p < kReturnPacks; ++p) {
    d1[p] = sums[p].d1;
    d2[p] = sums[p].d2;
  }
  for (; r + kReturnGroup <= rows.size; r += kReturnGroup) {
    Pack<double> value[kReturnPacks];
    Pack<double> squares[kReturnPacks];
    Pack<double> all;
    for (int64_t p = 0; p < kReturnPacks; ++p) {
      const int64_t i = r + p * kPack<double>;
      const Pack<double> past = load_pack<double>(rows.returns + i) * gamma;
      value[p] = (kClearsBefore ? (load_flags(rows.done + i) ? zero : past) : past) +
                 load_pack<double>(rows.reward + i);
      const Pack<double> d = value[p] - shift;
      squares[p] = d2[p] + d * d;
      all = p == 0 ? squares[p] : all + squares[p];
    }
    // Far below what usable() asks for, with a shift of 1e140 too.
    if (!all_within(all, 1e280)) {
      break;
    }
    for (int64_t p = 0; p < kReturnPacks; ++p) {
      const int64_t i = r + p * kPack<double>;
      store_pack<double>(
          rows.returns + i,
          kClearsBefore ? value[p] : (load_flags(rows.done + i) ? zero : value[p]));
      d1[p] += value[p] - shift;
      d2[p] = squares[p];
    }
  }
  for (int64_t p = 0; p < kReturnPacks; ++p) {
    sums[p].d1 = d1[p];
    sums[p].d2 = d2[p];
  }
  return r;
}

// The same with each row asked: whether it counts, and whether it can be summed.
template <typename Round, typename T>
void step_each(const RewardRows<T>& rows, int64_t r, Pack<double> shift, Discount by,
               Sums<Pack<double>, true>* sums) {
  for (int64_t p = 0; p < kReturnPacks; ++p) {
    const int64_t i = r + p * kPack<double>;
    const ReturnStep<Pack<double>> step =
        step_return(load_pack<double>(rows.returns + i),
                    load_pack<double>(rows.reward + i), load_flags(rows.done + i),
                    rows.counts != nullptr ? load_flags(rows.counts + i) : Flags{} == 0,
                    by, Round());
    store_pack<double>(rows.returns + i, step.left);
    sums[p].add(step.seen, shift);
  }
}

// Adds the rows to the sums. What comes before `rows` in a chunk are whole groups.
template <typename Round, bool kClearsBefore, typename T>
void step_rows(const RewardRows<T>& rows, double shift, Discount by, ReturnSums* to) {
  const Pack<double> shifts = Pack<double>{} + shift;
  const bool may_be_usable = std::is_same_v<Round, InDouble> &&
                             rows.counts == nullptr && std::fabs(shift) <= 1e140;
  int64_t r = 0;
  for (; r + kReturnGroup <= rows.size; r += kReturnGroup) {
    if (may_be_usable) {
      const int64_t end =
          step_usable<kClearsBefore>(rows, r, shifts, by.gamma, to->packs);
      to->rest.n += static_cast<double>(end - r);
      r = end;
      if (r + kReturnGroup > rows.size) {
        break;
      }
    }
    step_each<Round>(rows, r, shifts, by, to->packs);
  }
  for (; r < rows.size; ++r) {
    const ReturnStep<double> step = step_return(
        rows.returns[r], static_cast<double>(rows.reward[r]), rows.done[r] != 0,
        rows.counts == nullptr || rows.counts[r] != 0, by, Round());
    rows.returns[r] = step.left;
    to->rest = reduce(to->rest, step.seen, shift);
  }
}

class ScaleReturns {
 public:
  ScaleReturns(const Returns& of, Discount by, Weights weights, const Rule& rule)
      : of_(of),
        key_(of.key),
        by_(by),
        weights_(weights),
        rule_(rule),
        chunks_(ceil_div(key_.samples, kReturnRows)) {
    const int64_t n = key_.features;
    shifts_ = workspace(3 * n + chunks_ * (3 * n + 1));
    counted_ = shifts_ + n;
    statistics_ = reinterpret_cast<Statistic*>(counted_ + chunks_);
    partials_ = reinterpret_cast<Partial*>(statistics_ + n);
  }

  void run(RunPhases run) {
    for (int64_t f = 0; f < key_.features; ++f) {
      shifts_[f] = shift_of_returns(key_, f, first_reward(f), weights_);
    }
    const int64_t values = key_.samples * key_.features;
    if (values < kSerialValues) {
      step_chunks(0, chunks_);
      finish();
      scale_chunks(0, chunks_);
      return;
    }
    run({{chunks_, [this](int64_t begin, int64_t end) { step_chunks(begin, end); }},
         {1,
          [this](int64_t begin, int64_t end) {
            if (begin < end) {
              finish();
            }
          }},
         {chunks_, [this](int64_t begin, int64_t end) { scale_chunks(begin, end); }}},
        values);
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

  void step_chunks(int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      step(c);
    }
  }

  void scale_chunks(int64_t begin, int64_t end) const {
    for (int64_t c = end - 1; c >= begin; --c) {
      scale(c);
    }
  }

  void step(int64_t chunk) {
    const Range rows = rows_of_chunk(chunk);
    const bool* mask = key_.mask;
    counted_[chunk] = static_cast<double>(
        mask != nullptr ? std::count(mask + rows.begin, mask + rows.end, true)
                        : rows.size());
    for (int64_t f = 0; f < key_.features; ++f) {
      ReturnSums sums;
      dispatch_any(key_.x.dtype, [&](auto type) {
        using T = typename decltype(type)::type;
        const T* reward = static_cast<const T*>(key_.x.data) +
                          rows.begin * key_.x.row_stride + f * key_.x.feature_stride;
        if (of_.returns.dtype == Dtype::kFloat64) {
          step_feature<double, InDouble>(rows, f, reward, &sums);
        } else {
          step_feature<float, InFloat>(rows, f, reward, &sums);
        }
      });
      partials_[chunk * key_.features + f] = sums.total();
    }
  }

  template <typename G, typename Round, typename T>
  void step_feature(Range rows, int64_t f, const T* reward, ReturnSums* sums) const {
    const uint8_t* done = bytes(of_.done + rows.begin);
    const uint8_t* counts =
        key_.mask != nullptr ? bytes(key_.mask + rows.begin) : nullptr;
    G* const returns =
        static_cast<G*>(of_.returns.data) + rows.begin * key_.features + f;
    if constexpr (std::is_same_v<G, double> &&
                  (std::is_same_v<T, float> || std::is_same_v<T, double>)) {
      if (key_.features == 1 && key_.x.row_stride == 1) {
        step_some<Round>(RewardRows<T>{reward, done, counts, returns, rows.size()}, f,
                         sums);
        return;
      }
    }
    double wide_reward[kReturnBlock];
    double wide[kReturnBlock];
    for (int64_t at = 0; at < rows.size(); at += kReturnBlock) {
      const int64_t n = std::min(kReturnBlock, rows.size() - at);
      convert(reward + at * key_.x.row_stride, key_.x.row_stride, n, wide_reward);
      convert(returns + at * key_.features, key_.features, n, wide);
      step_some<Round>(
          RewardRows<double>{wide_reward, done + at,
                             counts != nullptr ? counts + at : nullptr, wide, n},
          f, sums);
      for (int64_t r = 0; r < n; ++r) {
        returns[(at + r) * key_.features] = static_cast<G>(wide[r]);
      }
    }
  }

  template <typename Round, typename T>
  void step_some(const RewardRows<T>& rows, int64_t f, ReturnSums* sums) const {
    if (by_.clears_before) {
      step_rows<Round, true>(rows, shifts_[f], by_, sums);
    } else {
      step_rows<Round, false>(rows, shifts_[f], by_, sums);
    }
  }

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
    for (int64_t c = 0; c < chunks_; ++c) {
      samples += counted_[c];
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
  // In the block that the calling thread keeps.
  double* shifts_;         // [features]
  double* counted_;        // [chunks]
  Statistic* statistics_;  // [features]
  Partial* partials_;      // [chunks, features]
};

}  // namespace

void scale_returns(const Returns& of, Discount by, Weights weights, const Rule& rule,
                   RunPhases run) {
  if (of.key.samples > 0 && of.key.features > 0) {
    ScaleReturns(of, by, weights, rule).run(run);
    trim_workspace();
  }
}

}  // namespace VECNORM_ISA
}  // namespace cpu
}  // namespace vecnorm
