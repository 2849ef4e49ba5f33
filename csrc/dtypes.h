// Copyright (c) the torchrl_vecnorm authors.
//
// This source code is licensed under the MIT license found in the
// LICENSE file in the root directory of this source tree.

// The element types that values and states come in, without torch's own headers.

#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "moments.h"

namespace vecnorm {

enum class Dtype : int8_t {
  kFloat32,
  kFloat64,
  kFloat16,
  kBFloat16,
  kInt8,
  kInt16,
  kInt32,
  kInt64,
  kUInt8,
  kBool,
};

// Bytes of a value.
VECNORM_HD int value_size(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat64:
    case Dtype::kInt64:
      return 8;
    case Dtype::kFloat32:
    case Dtype::kInt32:
      return 4;
    case Dtype::kFloat16:
    case Dtype::kBFloat16:
    case Dtype::kInt16:
      return 2;
    default:
      return 1;
  }
}

VECNORM_HD uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

VECNORM_HD float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

struct BFloat16 {
  uint16_t bits;

  // A GPU is told that this is a move: shifts of whole vectors take registers.
  VECNORM_HD operator float() const {
#ifdef __CUDA_ARCH__
    float x;
    asm("{.reg .b16 zero; mov.b16 zero, 0; mov.b32 %0, {zero, %1};}"
        : "=f"(x)
        : "h"(bits));
    return x;
#else
    return float_of(static_cast<uint32_t>(bits) << 16);
#endif
  }

  VECNORM_HD static BFloat16 round(float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    return {static_cast<uint16_t>(round_pair(x, 0.f))};
#else
    const uint32_t u = bits_of(x);
    // Round to nearest even; a NaN stays one.
    const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    const uint32_t quiet = (u >> 16) | 0x40u;
    return {static_cast<uint16_t>(x != x ? quiet : rounded)};
#endif
  }

  // Two at once, the first one in the lower half.
  VECNORM_HD static uint32_t round_pair(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    uint32_t both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
#else
    return round(low).bits | static_cast<uint32_t>(round(high).bits) << 16;
#endif
  }
};

// GPUs convert in one instruction (and make of a NaN what torch makes of it there). In
// plain C++ both directions are without branches, so that compilers can vectorise the
// loops around them; the scaling by powers of two is the one in Giesen's "half to float
// done quic".
struct Float16 {
  uint16_t bits;

  VECNORM_HD operator float() const {
#ifdef __CUDA_ARCH__
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
#else
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
    const uint32_t rest = static_cast<uint32_t>(bits & 0x7fffu) << 13;
    const float scaled = float_of(rest) * float_of(0x77800000u);  // 2^112
    // Exponent 31 is inf or NaN: after the scaling it is 2^16 and more.
    const uint32_t special = scaled >= 65536.f ? 0x7f800000u : 0u;
    return float_of(bits_of(scaled) | special | sign);
#endif
  }

  VECNORM_HD static Float16 round(float x) {
#ifdef __CUDA_ARCH__
    Float16 rounded;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(rounded.bits) : "f"(x));
    return rounded;
#else
    const uint32_t u = bits_of(x);
    const uint32_t sign = (u >> 16) & 0x8000u;
    const uint32_t magnitude = u & 0x7fffffffu;
    // Normal results: rebias the exponent and round to nearest even.
    const uint32_t odd = (magnitude >> 13) & 1u;
    const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + odd) >> 13;
    // Subnormal results: adding 0.5 lets the FPU do the shift and the rounding.
    const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
    uint32_t h = magnitude < 0x38800000u ? subnormal : normal;
    h = magnitude >= 0x47800000u ? 0x7c00u : h;  // 65536 and more, inf
    h = magnitude > 0x7f800000u ? 0x7e00u : h;   // NaN
    return {static_cast<uint16_t>(h | sign)};
#endif
  }

  VECNORM_HD static uint32_t round_pair(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    uint32_t both;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
#else
    return round(low).bits | static_cast<uint32_t>(round(high).bits) << 16;
#endif
  }
};

// The arithmetic that holds every value of T.
template <typename T>
struct Compute {
  using type = float;
};
template <>
struct Compute<double> {
  using type = double;
};
template <>
struct Compute<int32_t> {
  using type = double;
};
template <>
struct Compute<int64_t> {
  using type = double;
};

template <typename C, typename T>
VECNORM_HD C load(T x) {
  if constexpr (std::is_same_v<T, Float16> || std::is_same_v<T, BFloat16>) {
    return static_cast<C>(static_cast<float>(x));
  } else {
    return static_cast<C>(x);
  }
}

template <typename T, typename C>
VECNORM_HD T store(C x) {
  if constexpr (std::is_same_v<T, Float16> || std::is_same_v<T, BFloat16>) {
    return T::round(static_cast<float>(x));
  } else {
    return static_cast<T>(x);
  }
}

template <typename T>
struct Type {
  using type = T;
};

// Calls f(Type<T>{}) for the T that `dtype` names.
template <typename F>
VECNORM_HD void dispatch_float(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::kFloat64:
      return f(Type<double>{});
    case Dtype::kFloat16:
      return f(Type<Float16>{});
    case Dtype::kBFloat16:
      return f(Type<BFloat16>{});
    default:
      return f(Type<float>{});
  }
}

template <typename F>
VECNORM_HD void dispatch_any(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::kInt8:
      return f(Type<int8_t>{});
    case Dtype::kInt16:
      return f(Type<int16_t>{});
    case Dtype::kInt32:
      return f(Type<int32_t>{});
    case Dtype::kInt64:
      return f(Type<int64_t>{});
    case Dtype::kUInt8:
      return f(Type<uint8_t>{});
    case Dtype::kBool:
      return f(Type<bool>{});
    default:
      return dispatch_float(dtype, f);
  }
}

}  // namespace vecnorm
