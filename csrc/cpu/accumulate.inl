// Copyright (c) the torchrl_vecnorm authors.
//
// This source code is licensed under the MIT license found in the
// LICENSE file in the root directory of this source tree.

// Sums over some rows: n, Σd and Σd² of every feature, d = x - shift.
//
// At first every value counts, in the arithmetic of its dtype (C); whether such sums
// can be trusted is asked afterwards (moments.h). Where not, all is summed again in
// double, and every value looked at (kLooks): those that are not usable are left out.

namespace vecnorm {
namespace cpu {
namespace VECNORM_ISA {
namespace {

// Few features fill this many packs, with whole rows taken as one.
constexpr int64_t kGroupPacks = 4;
template <typename C>
constexpr int64_t kLanes = kGroupPacks * kPack<C>;
// Packs of a row whose sums, or coefficients, stay in registers, most of them where
// there are but 16.
constexpr int64_t kNarrowPacks = 8;
// Wider rows are walked this many packs at a time, whose sums stay in the cache.
constexpr int64_t kWidePacks = 64;
// Rows that are added at once there, so that sums are read and written less often.
constexpr int64_t kWideRows = 4;
// Packs of a cache line.
constexpr int64_t kLinePacks = std::max<int64_t>(1, 64 / kPackBytes);
// Rows that are summed in float before they are flushed to double. Rounding is then at
// most 64 · 2^-24 = 4e-6 of Σd², however many rows there are. Values of few digits come
// near it, as their rounding errors are alike; half as many rows would halve it, at 2 %
// of the time.
constexpr int64_t kFlushRows = 128;
// Fewer rows than that are summed in double at once: checking would cost as much.
constexpr int64_t kFewRows = 16;

// Some rows and lanes of a matrix.
template <typename T>
struct Rows {
  T* data;
  int64_t row_stride;
  int64_t lane_stride;
};

template <typename T>
Rows<T> rows_at(const Matrix& m, Range rows, Range features) {
  return {static_cast<T*>(m.data) + rows.begin * m.row_stride +
              features.begin * m.feature_stride,
          m.row_stride, m.feature_stride};
}

// What loops over some wide rows at once ask for in advance, a line of each row at a
// time: hardware does it along rows, but not from one to the next. Rows without gaps
// are asked for in the order of memory, which takes a quarter off what comes from DRAM.
template <typename C, typename T>
struct Ahead {
  static constexpr int64_t kRun = kLinePacks * kPack<C>;  // values of a row at a time

  const T* at;
  int64_t row;   // from one row to the next
  int64_t line;  // and from one line to the next

  // `some` rows of `lanes` values at `x`, of which `first` are done elsewhere.
  Ahead(const T* x, int64_t row_stride, int64_t some, int64_t lanes, int64_t first) {
    const bool gapless = row_stride == lanes;
    at = x + some * row_stride + first;
    row = gapless ? kRun : row_stride;
    line = gapless ? some * kRun : kRun;
  }

  inline void fetch(int64_t some) {
    for (int64_t i = 0; i < some; ++i) {
      __builtin_prefetch(at + i * row);
    }
    at += line;
  }
};

// Calls f(std::integral_constant<int64_t, packs>()): `packs` is 1 to kNarrowPacks.
template <int64_t N = 1, typename F>
inline void with_packs(int64_t packs, F f) {
  if constexpr (N <= kNarrowPacks) {
    if (packs == N) {
      f(std::integral_constant<int64_t, N>());
    } else {
      with_packs<N + 1>(packs, f);
    }
  }
}

// How many whole rows of `m` are taken as one, so that few features fill the registers.
template <typename C>
int64_t group_of(const Matrix& m, int64_t features) {
  const bool dense = m.feature_stride == 1 && m.row_stride == features;
  return dense && 0 < features && features < kLanes<C> ? kLanes<C> / features : 1;
}

// The first n of some values, over and over.
template <typename T>
void repeat(T* values, int64_t n, int64_t times) {
  for (int64_t done = 1; done < times;) {
    const int64_t more = std::min(done, times - done);
    std::copy_n(values, more * n, values + done * n);
    done += more;
  }
}

template <typename T>
struct Counted {
  T value{};
};
struct Nothing {};

// The sums of one pack of lanes. T is a Pack, or its element for a single lane.
template <typename T, bool kLooks>
struct Sums {
  T d1{};
  T d2{};
  [[no_unique_address]] std::conditional_t<kLooks, Counted<T>, Nothing> n;

  inline void add(T x, T shift) {
    if constexpr (kLooks) {
      const auto good = x * x <= 1e290;  // usable(x)
      const T none{};
      const T one = none + 1.;
      const T d = good ? x - shift : none;
      n.value += good ? one : none;
      d1 += d;
      d2 += d * d;
    } else {
      const T d = x - shift;
      d1 += d;
      d2 += d * d;
    }
  }
};

// Where sums go.
struct Totals {
  double* n;
  double* d1;
  double* d2;

  Totals operator+(int64_t f) const { return {n + f, d1 + f, d2 + f}; }

  // Adds a pack's sums, but for the lanes before `skip`, which another pack has.
  template <typename C, bool kLooks>
  void add(const Sums<Pack<C>, kLooks>& sums, int64_t skip) const {
    if constexpr (kLooks) {
      add_lanes<C>(n, sums.n.value, skip);
    }
    add_lanes<C>(d1, sums.d1, skip);
    add_lanes<C>(d2, sums.d2, skip);
  }

 private:
  template <typename C>
  static void add_lanes(double* to, Pack<C> from, int64_t skip) {
    if (skip == 0) {  // nearly always: loops of a known length become packs
      for (int64_t j = 0; j < kPack<C>; ++j) {
        to[j] += from[j];
      }
    } else {
      for (int64_t j = skip; j < kPack<C>; ++j) {
        to[j] += from[j];
      }
    }
  }
};

// Rows of N packs at most, all sums in registers.
template <typename C, bool kLooks, int64_t N, typename T>
void sum_narrow(const T* x, int64_t row_stride, int64_t rows, const bool* mask,
                int64_t lanes, const C* shift, Totals totals) {
  const int64_t last = lanes - kPack<C>;
  Pack<C> s[N];
  Sums<Pack<C>, kLooks> sums[N];
  for (int64_t p = 0; p < N; ++p) {
    s[p] = load_pack<C>(shift + (p + 1 < N ? p * kPack<C> : last));
  }
  for (int64_t r = 0; r < rows; ++r, x += row_stride) {
    if (mask == nullptr || mask[r]) {
      for (int64_t p = 0; p < N; ++p) {
        sums[p].add(load_pack<C>(x + (p + 1 < N ? p * kPack<C> : last)), s[p]);
      }
    }
  }
  for (int64_t p = 0; p < N; ++p) {
    const int64_t at = p + 1 < N ? p * kPack<C> : last;
    (totals + at).add<C>(sums[p], p * kPack<C> - at);
  }
}

// Rows of any width. They are read whole, some at a time: memory is then read in order.
template <typename C, bool kLooks, typename T>
void sum_wide(const T* x, int64_t row_stride, int64_t rows, const bool* mask,
              int64_t lanes, const double* shift, Totals totals) {
  const Packs<C> packs{lanes};
  for (int64_t begin = 0; begin < packs.size(); begin += kWidePacks) {
    const int64_t n = std::min(kWidePacks, packs.size() - begin);
    Pack<C> s[kWidePacks];
    Sums<Pack<C>, kLooks> sums[kWidePacks];
    for (int64_t p = 0; p < n; ++p) {
      s[p] = load_pack<C>(shift + packs[begin + p]);
    }
    const int64_t first = begin * kPack<C>;
    const int64_t last = packs[begin + n - 1];
    const auto add = [&](auto count, const T* const* rows_to_add) {
      constexpr int64_t k = decltype(count)::value;
      const T* row[k];
      std::copy(rows_to_add, rows_to_add + k, row);
      const auto add_pack = [&](int64_t p, int64_t at) {
        Sums<Pack<C>, kLooks> sum = sums[p];
        for (int64_t i = 0; i < k; ++i) {
          sum.add(load_pack<C>(row[i] + at), s[p]);
        }
        sums[p] = sum;
      };
      Ahead<C, T> ahead(row[0], row_stride, k, std::min(lanes, kWidePacks * kPack<C>),
                        first);
      int64_t p = 0;
      for (; p + kLinePacks < n; p += kLinePacks) {
        const int64_t at = first + p * kPack<C>;
        ahead.fetch(k);
        for (int64_t q = 0; q < kLinePacks; ++q) {
          add_pack(p + q, at + q * kPack<C>);
        }
      }
      for (; p + 1 < n; ++p) {
        add_pack(p, first + p * kPack<C>);
      }
      add_pack(n - 1, last);
    };
    const T* taken[kWideRows];
    int64_t count = 0;
    for (int64_t r = 0; r < rows; ++r) {
      if (mask == nullptr || mask[r]) {
        taken[count++] = x + r * row_stride;
      }
      if (count == kWideRows) {
        add(std::integral_constant<int64_t, kWideRows>(), taken);
        count = 0;
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      add(std::integral_constant<int64_t, 1>(), taken + i);
    }
    for (int64_t p = 0; p < n; ++p) {
      const int64_t at = packs[begin + p];
      (totals + at).add<C>(sums[p], (begin + p) * kPack<C> - at);
    }
  }
}

// Few rows, in double, two packs at a time, the last of which reach back. Values are
// looked at where they have to be, pack by pack. Returns whether none was.
template <typename T>
bool sum_few(const Rows<const T>& x, int64_t rows, const bool* mask, int64_t lanes,
             int64_t counted, const double* shift, Totals totals) {
  constexpr int64_t k = kPack<double>;
  bool complete = true;
  for (int64_t begin = 0; begin < lanes; begin += 2 * k) {
    const int64_t at = std::min(begin, lanes - 2 * k);
    const Pack<double> s[2] = {load_pack<double>(shift + at),
                               load_pack<double>(shift + at + k)};
    const auto for_values = [&](auto add) {
      const T* row = x.data + at;
      for (int64_t r = 0; r < rows; ++r, row += x.row_stride) {
        if (mask == nullptr || mask[r]) {
          add(0, load_pack<double>(row));
          add(1, load_pack<double>(row + k));
        }
      }
    };
    Pack<double> d1[2] = {};
    Pack<double> d2[2] = {};
    for_values([&](int64_t p, Pack<double> value) {
      const Pack<double> d = value - s[p];
      d1[p] += d;
      d2[p] += d * d;
    });
    // all_usable() of moments.h
    if (!all_within(d2[0] + s[0] * s[0] + (d2[1] + s[1] * s[1]), 1e289)) {
      if (complete) {
        std::fill_n(totals.n, lanes, static_cast<double>(counted));
        complete = false;
      }
      Sums<Pack<double>, true> sums[2];
      for_values([&](int64_t p, Pack<double> value) { sums[p].add(value, s[p]); });
      for (int64_t p = 0; p < 2; ++p) {
        store_pack<double>(totals.n + at + p * k, sums[p].n.value);
        d1[p] = sums[p].d1;
        d2[p] = sums[p].d2;
      }
    }
    for (int64_t p = 0; p < 2; ++p) {
      store_pack<double>(totals.d1 + at + p * k, d1[p]);
      store_pack<double>(totals.d2 + at + p * k, d2[p]);
    }
  }
  return complete;
}

// One lane: of rows that are shorter than a register, or strided.
template <typename C, bool kLooks, typename T>
void sum_lane(const T* x, int64_t row_stride, int64_t rows, const bool* mask, C shift,
              Totals totals) {
  Sums<C, kLooks> sums;
  for (int64_t r = 0; r < rows; ++r) {
    if (mask == nullptr || mask[r]) {
      sums.add(load<C>(x[r * row_stride]), shift);
    }
  }
  if constexpr (kLooks) {
    *totals.n += sums.n.value;
  }
  *totals.d1 += sums.d1;
  *totals.d2 += sums.d2;
}

// All lanes of some rows.
template <typename C, bool kLooks, typename T>
void sum_rows(const Rows<const T>& x, int64_t rows, const bool* mask, int64_t lanes,
              const double* shift, Totals totals) {
  for (int64_t begin = 0; begin < rows; begin += kFlushRows) {
    const int64_t n = std::min(kFlushRows, rows - begin);
    const bool* m = mask != nullptr ? mask + begin : nullptr;
    const T* at = x.data + begin * x.row_stride;
    if (x.lane_stride != 1 || lanes < kPack<C>) {
      for (int64_t j = 0; j < lanes; ++j) {
        sum_lane<C, kLooks>(at + j * x.lane_stride, x.row_stride, n, m,
                            static_cast<C>(shift[j]), totals + j);
      }
    } else if (lanes > kNarrowPacks * kPack<C>) {
      sum_wide<C, kLooks>(at, x.row_stride, n, m, lanes, shift, totals);
    } else {
      C s[kNarrowPacks * kPack<C>];
      for (int64_t j = 0; j < lanes; ++j) {
        s[j] = static_cast<C>(shift[j]);
      }
      with_packs(ceil_div(lanes, kPack<C>), [&](auto packs) {
        sum_narrow<C, kLooks, decltype(packs)::value>(at, x.row_stride, n, m, lanes, s,
                                                      totals);
      });
    }
  }
}

// The same with `group` whole rows taken as one.
template <typename C, bool kLooks, typename T>
void sum_grouped(const Rows<const T>& x, int64_t rows, int64_t group, int64_t features,
                 const double* shift, Totals totals) {
  const int64_t lanes = group * features;
  double lane_shift[kLanes<C>];
  double sums[3][kLanes<C>] = {};
  std::copy_n(shift, features, lane_shift);
  repeat(lane_shift, features, group);
  const Totals lane_totals{sums[0], sums[1], sums[2]};
  const int64_t whole = rows / group;
  sum_rows<C, kLooks>(Rows<const T>{x.data, lanes, 1}, whole, nullptr, lanes,
                      lane_shift, lane_totals);
  const int64_t tail = (rows - whole * group) * features;
  sum_rows<C, kLooks>(Rows<const T>{x.data + whole * lanes, lanes, 1}, tail > 0 ? 1 : 0,
                      nullptr, tail, lane_shift, lane_totals);
  for (int64_t j = 0; j < lanes; j += features) {
    for (int64_t f = 0; f < features; ++f) {
      if constexpr (kLooks) {
        totals.n[f] += sums[0][j + f];
      }
      totals.d1[f] += sums[1][j + f];
      totals.d2[f] += sums[2][j + f];
    }
  }
}

// Σd and Σd² of some rows, of which the mask leaves `counted`. Returns whether all
// values of theirs are known to count; n is written where they are not.
template <typename T>
bool sum_piece(const Matrix& x, Range rows, Range features, const bool* mask,
               int64_t counted, const double* shift, bool is_anchored, Totals totals) {
  const Rows<const T> at = rows_at<const T>(x, rows, features);
  const int64_t width = features.size();
  if (rows.size() < kFewRows && at.lane_stride == 1 && width > kLanes<double>) {
    return sum_few(at, rows.size(), mask, width, counted, shift, totals);
  }
  using C = typename Compute<T>::type;
  const auto sum = [&](auto arithmetic, auto looks) {
    using A = typename decltype(arithmetic)::type;
    constexpr bool kLooks = decltype(looks)::value;
    if constexpr (kLooks) {
      std::fill_n(totals.n, width, 0.);
    }
    std::fill_n(totals.d1, width, 0.);
    std::fill_n(totals.d2, width, 0.);
    const int64_t group = mask == nullptr ? group_of<A>(x, width) : 1;
    if (group > 1) {
      sum_grouped<A, kLooks>(at, rows.size(), group, width, shift, totals);
    } else {
      sum_rows<A, kLooks>(at, rows.size(), mask, width, shift, totals);
    }
  };
  if (rows.size() >= kFewRows || std::is_same_v<C, double>) {
    sum(Type<C>{}, std::false_type{});
    const double n = static_cast<double>(counted);
    bool good = true;
    for (int64_t f = 0; f < width; ++f) {
      if constexpr (std::is_same_v<C, double>) {
        good &= all_usable(totals.d2[f], shift[f]);
      } else {
        good &= trustworthy(n, totals.d1[f], totals.d2[f], is_anchored);
      }
    }
    if (good) {
      return true;
    }
  }
  sum(Type<double>{}, std::true_type{});
  return false;
}

}  // namespace
}  // namespace VECNORM_ISA
}  // namespace cpu
}  // namespace vecnorm
