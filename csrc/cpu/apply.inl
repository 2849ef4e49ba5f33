// Copyright (c) the torchrl_vecnorm authors.
//
// This source code is licensed under the MIT license found in the
// LICENSE file in the root directory of this source tree.

// y = map(x) over some rows; a map (moments.h) has three coefficients for each feature.
//
// x and y are one tensor or two that share nothing. Where a row's last pack reaches
// back it is loaded before anything of the row is stored: in place its lanes would be
// mapped twice.

namespace vecnorm {
namespace cpu {
namespace VECNORM_ISA {
namespace {

// Larger outputs are written around the caches, which could not keep them.
constexpr int64_t kStreamBytes = 48 << 20;
// Of larger ones a line is read before a part of it is written.
constexpr int64_t kWholeLineBytes = 16 << 20;

// The coefficients of a map, as arrays over lanes.
template <typename C>
struct Coefficients {
  C* a;
  C* b;
  C* c;
  C limit = std::numeric_limits<C>::infinity();

  Coefficients(void* block, int64_t width)
      : a(static_cast<C*>(block)), b(a + width), c(b + width) {}

  Coefficients operator+(int64_t lane) const {
    Coefficients k = *this;
    k.a += lane;
    k.b += lane;
    k.c += lane;
    return k;
  }
};

// A map on packs. The formulas are those of moments.h, whose functions are compiled for
// any processor. Without a clip the loops have nothing of it: they are bound by what
// they read and compute.
template <template <typename> class Map, typename C, bool kClips>
struct PackMap {
  using Scalar = Map<C>;

  Pack<C> a;
  Pack<C> b;
  Pack<C> c;

  PackMap() = default;
  PackMap(const Coefficients<C>& k, int64_t lane)
      : a(load_pack<C>(k.a + lane)),
        b(load_pack<C>(k.b + lane)),
        c(load_pack<C>(k.c + lane)) {}

  inline Pack<C> operator()(Pack<C> x, C limit) const {
    if constexpr (std::is_same_v<Map<C>, Affine<C>>) {
      return clip((x - a) * b + c, limit);
    } else {
      static_assert(std::is_same_v<Map<C>, InverseAffine<C>>);
      return (clip(x, limit) * a + c) + b;
    }
  }

  static inline Pack<C> clip(Pack<C> y, C limit) {
    if constexpr (!kClips) {
      return y;
    }
    const Pack<C> most = limit - Pack<C>{};
    y = y < -most ? -most : y;
    return y > most ? most : y;
  }
};

template <bool kStream, typename C, typename T>
inline void put(T* at, Pack<C> y) {
  if constexpr (kStream) {
    stream(at, y);
  } else {
    store_pack<C>(at, y);
  }
}

// Rows of N packs at most, all coefficients in registers.
template <typename M, typename C, int64_t N, bool kStream, typename In, typename Out>
void map_narrow(const In* x, int64_t x_stride, Out* y, int64_t y_stride, int64_t rows,
                int64_t lanes, const Coefficients<C>& k) {
  const int64_t last = lanes - kPack<C>;
  M maps[N];
  for (int64_t p = 0; p < N; ++p) {
    maps[p] = M(k, p + 1 < N ? p * kPack<C> : last);
  }
  for (int64_t r = 0; r < rows; ++r, x += x_stride, y += y_stride) {
    Pack<C> value[N];
    for (int64_t p = 0; p < N; ++p) {
      value[p] = load_pack<C>(x + (p + 1 < N ? p * kPack<C> : last));
    }
    for (int64_t p = 0; p < N; ++p) {
      put<kStream, C>(y + (p + 1 < N ? p * kPack<C> : last),
                      maps[p](value[p], k.limit));
    }
  }
}

// R rows of any width at once, so that coefficients are read once for all of them. All
// packs but the first and the last start `skip` values in.
template <typename M, typename C, int64_t R, bool kStream, typename In, typename Out>
void map_wide(const In* x, int64_t x_stride, Out* y, int64_t y_stride, int64_t lanes,
              int64_t skip, const Coefficients<C>& k) {
  const int64_t last = lanes - kPack<C>;
  Pack<C> head[R];
  Pack<C> tail[R];
  for (int64_t r = 0; r < R; ++r) {
    head[r] = load_pack<C>(x + r * x_stride);
    tail[r] = load_pack<C>(x + r * x_stride + last);
  }
  const auto apply = [&](int64_t j) {
    const M map(k, j);
    for (int64_t r = 0; r < R; ++r) {
      put<kStream, C>(y + r * y_stride + j,
                      map(load_pack<C>(x + r * x_stride + j), k.limit));
    }
  };
  Ahead<C, In> ahead(x, x_stride, R, lanes, skip);
  int64_t j = skip;
  for (; j + (kLinePacks - 1) * kPack<C> < last; j += kLinePacks * kPack<C>) {
    ahead.fetch(R);
    for (int64_t q = 0; q < kLinePacks; ++q) {
      apply(j + q * kPack<C>);
    }
  }
  for (; j < last; j += kPack<C>) {
    apply(j);
  }
  const M first_map(k, 0);
  const M last_map(k, last);
  for (int64_t r = 0; r < R; ++r) {
    put<kStream, C>(y + r * y_stride, first_map(head[r], k.limit));
    put<kStream, C>(y + r * y_stride + last, last_map(tail[r], k.limit));
  }
}

template <typename M, typename C, bool kStream, typename In, typename Out>
void map_packs(const In* x, int64_t x_stride, Out* y, int64_t y_stride, int64_t rows,
               int64_t lanes, int64_t fresh_bytes, const Coefficients<C>& k) {
  const int64_t packs = ceil_div(lanes, kPack<C>);
  if (packs <= kNarrowPacks) {
    return with_packs(packs, [&](auto n) {
      map_narrow<M, C, decltype(n)::value, kStream>(x, x_stride, y, y_stride, rows,
                                                    lanes, k);
    });
  }
  constexpr int64_t bytes = kPack<C> * sizeof(Out);
  const auto to_line = [](const Out* at) {
    const int64_t beyond = reinterpret_cast<uintptr_t>(at) % bytes;
    return (bytes - beyond) / static_cast<int64_t>(sizeof(Out));
  };
  // Where rows begin anywhere in a line, stores that cross from one to the next cost
  // less than to read coefficients for each row. Beyond the caches it pays to write
  // whole lines, if packs are as long.
  const bool one_by_one =
      bytes == 64 && y_stride % kPack<C> != 0 && fresh_bytes >= kWholeLineBytes;
  int64_t r = 0;
  for (; !one_by_one && r + kWideRows <= rows; r += kWideRows) {
    map_wide<M, C, kWideRows, kStream>(x + r * x_stride, x_stride, y + r * y_stride,
                                       y_stride, lanes, to_line(y + r * y_stride), k);
  }
  for (; r < rows; ++r) {
    Out* const row = y + r * y_stride;
    map_wide<M, C, 1, kStream>(x + r * x_stride, x_stride, row, y_stride, lanes,
                               to_line(row), k);
  }
}

template <typename M, typename C, typename In, typename Out>
void map_rows(const Rows<const In>& x, const Rows<Out>& y, int64_t rows, int64_t lanes,
              int64_t fresh_bytes, const Coefficients<C>& k) {
  if (x.lane_stride != 1 || y.lane_stride != 1 || lanes < kPack<C>) {
    for (int64_t r = 0; r < rows; ++r) {
      const In* in = x.data + r * x.row_stride;
      Out* out = y.data + r * y.row_stride;
      for (int64_t j = 0; j < lanes; ++j) {
        const typename M::Scalar map{k.a[j], k.b[j], k.c[j]};
        out[j * y.lane_stride] =
            store<Out>(map(load<C>(in[j * x.lane_stride]), k.limit));
      }
    }
    return;
  }
  if constexpr (std::is_same_v<Out, C>) {
    const bool aligned = reinterpret_cast<uintptr_t>(y.data) % kPackBytes == 0 &&
                         y.row_stride % kPack<C> == 0 && lanes % kPack<C> == 0;
    if (fresh_bytes >= kStreamBytes && aligned) {
      map_packs<M, C, true>(x.data, x.row_stride, y.data, y.row_stride, rows, lanes,
                            fresh_bytes, k);
      return flush_stream();
    }
  }
  map_packs<M, C, false>(x.data, x.row_stride, y.data, y.row_stride, rows, lanes,
                         fresh_bytes, k);
}

// All rows of a piece, `group` of them taken as one.
template <typename M, typename C, typename In, typename Out>
void map_groups(Rows<const In> x, Rows<Out> y, int64_t rows, int64_t group,
                int64_t features, int64_t fresh_bytes, const Coefficients<C>& k) {
  const int64_t whole = rows / group;
  const int64_t tail = rows - whole * group;
  x.row_stride *= group;
  y.row_stride *= group;
  map_rows<M, C>(x, y, whole, group * features, fresh_bytes, k);
  if (tail > 0) {
    x.data += whole * x.row_stride;
    y.data += whole * y.row_stride;
    map_rows<M, C>(x, y, 1, tail * features, 0, k);
  }
}

template <template <typename> class Map, typename C, typename In, typename Out>
void map_piece(Rows<const In> x, Rows<Out> y, int64_t rows, int64_t group,
               int64_t features, int64_t fresh_bytes, const Coefficients<C>& k) {
  // Integers are rarely many, but for pixels: a loop more of each would take long to
  // compile.
  constexpr bool pixels = std::is_same_v<In, uint8_t> && std::is_same_v<Out, float>;
  if constexpr (std::is_same_v<In, Out> || pixels) {
    if (!std::isfinite(k.limit)) {
      return map_groups<PackMap<Map, C, false>>(x, y, rows, group, features,
                                                fresh_bytes, k);
    }
  }
  map_groups<PackMap<Map, C, true>>(x, y, rows, group, features, fresh_bytes, k);
}

}  // namespace
}  // namespace VECNORM_ISA
}  // namespace cpu
}  // namespace vecnorm
