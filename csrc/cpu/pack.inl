// Copyright (c) the torchrl_vecnorm authors.
//
// This source code is licensed under the MIT license found in the
// LICENSE file in the root directory of this source tree.

// One register of floats or doubles: compilers do what it says, where loops over arrays
// are at the mercy of their vectorisers. isa_*.cpp give its width, kPackBytes, and what
// plain C++ has no words for: stream, all_within, from_halves, to_halves,
// from_integers, widen, narrow.

namespace vecnorm {
namespace cpu {
namespace VECNORM_ISA {
namespace {

template <typename C>
struct PackOf {
  typedef C type __attribute__((vector_size(kPackBytes)));
};

template <typename C>
using Pack = typename PackOf<C>::type;

// Values in a pack.
template <typename C>
constexpr int64_t kPack = kPackBytes / sizeof(C);

typedef uint32_t FloatBits __attribute__((vector_size(kPackBytes)));

template <typename C, typename T>
inline Pack<C> load_pack(const T* at) {
  Pack<C> pack;
  if constexpr (std::is_same_v<T, C>) {
    std::memcpy(&pack, at, sizeof(pack));
  } else if constexpr (std::is_same_v<T, BFloat16> && std::is_same_v<C, float>) {
    FloatBits wide;
    widen(&at->bits, reinterpret_cast<uint32_t*>(&wide));
    wide <<= 16;
    std::memcpy(&pack, &wide, sizeof(pack));
  } else if constexpr (std::is_same_v<T, Float16> && std::is_same_v<C, float>) {
    from_halves(&at->bits, reinterpret_cast<float*>(&pack));
  } else if constexpr (std::is_integral_v<T> && sizeof(T) < sizeof(int32_t)) {
    // Pixels, above all. Left to the vectoriser, a pack went through memory in parts.
    using Integer = std::conditional_t<std::is_same_v<T, bool>, uint8_t, T>;
    from_integers(reinterpret_cast<const Integer*>(at), reinterpret_cast<C*>(&pack));
  } else if constexpr (std::is_same_v<T, float> && std::is_same_v<C, double>) {
    widen(at, reinterpret_cast<double*>(&pack));
  } else {
    for (int64_t j = 0; j < kPack<C>; ++j) {
      pack[j] = load<C>(at[j]);
    }
  }
  return pack;
}

template <typename C, typename T>
inline void store_pack(T* at, Pack<C> pack) {
  if constexpr (std::is_same_v<T, C>) {
    std::memcpy(at, &pack, sizeof(pack));
  } else if constexpr (std::is_same_v<T, BFloat16> && std::is_same_v<C, float>) {
    FloatBits u;
    std::memcpy(&u, &pack, sizeof(u));
    // As BFloat16::round has it.
    const FloatBits rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    const FloatBits quiet = (u >> 16) | 0x40u;
    const FloatBits kept = pack != pack ? quiet : rounded;
    narrow(reinterpret_cast<const uint32_t*>(&kept), &at->bits);
  } else if constexpr (std::is_same_v<T, Float16> && std::is_same_v<C, float>) {
    to_halves(reinterpret_cast<const float*>(&pack), &at->bits);
  } else {
    for (int64_t j = 0; j < kPack<C>; ++j) {
      at[j] = store<T>(static_cast<C>(pack[j]));
    }
  }
}

// A row of `lanes` values, kPack at least, is read as packs; the last one reaches back
// over lanes of the one before it.
template <typename C>
struct Packs {
  int64_t lanes;
  int64_t size() const { return ceil_div(lanes, kPack<C>); }
  int64_t operator[](int64_t p) const {
    return std::min(p * kPack<C>, lanes - kPack<C>);
  }
};

}  // namespace
}  // namespace VECNORM_ISA
}  // namespace cpu
}  // namespace vecnorm
