// Copyright (c) the torchrl_vecnorm authors.
//
// This source code is licensed under the MIT license found in the
// LICENSE file in the root directory of this source tree.

// The kernels for what every processor of the platform has: SSE2, NEON.

#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "isa.h"
#include "plan.h"

#define VECNORM_ISA baseline
constexpr int64_t kPackBytes = 16;
// Any processor: halves are converted one by one.
namespace vecnorm {
namespace cpu {
namespace baseline {
namespace {

#ifdef __SSE2__
inline void stream(float* to, __m128 y) { _mm_stream_ps(to, y); }
inline void stream(double* to, __m128d y) { _mm_stream_pd(to, y); }
inline void flush_stream() { _mm_sfence(); }
// Whether no value is beyond the limit, and none is NaN.
inline bool all_within(__m128d pack, double limit) {
  return _mm_movemask_pd(_mm_cmple_pd(pack, _mm_set1_pd(limit))) == 0x3;
}
#else
template <typename C, typename Pack>
inline void stream(C* to, Pack y) {
  std::memcpy(to, &y, sizeof(y));
}
inline void flush_stream() {}
template <typename Pack>
inline bool all_within(Pack pack, double limit) {
  bool all = true;
  for (int64_t j = 0; j < kPackBytes / 8; ++j) {
    all &= pack[j] <= limit;
  }
  return all;
}
#endif

inline void from_halves(const uint16_t* from, float* to) {
  for (int64_t j = 0; j < kPackBytes / 4; ++j) {
    to[j] = Float16{from[j]};
  }
}

inline void to_halves(const float* from, uint16_t* to) {
  for (int64_t j = 0; j < kPackBytes / 4; ++j) {
    to[j] = Float16::round(from[j]).bits;
  }
}

template <typename T, typename C>
inline void from_integers(const T* from, C* to) {
  for (size_t j = 0; j < kPackBytes / sizeof(C); ++j) {
    to[j] = static_cast<C>(from[j]);
  }
}

// 16 bits to 32 and back.
inline void widen(const uint16_t* from, uint32_t* to) {
  std::copy(from, from + kPackBytes / 4, to);
}

// A byte to 64 bits, a float to a double.
template <typename From, typename To>
inline void widen(const From* from, To* to) {
  std::copy(from, from + kPackBytes / 8, to);
}

inline void narrow(const uint32_t* from, uint16_t* to) {
  for (int64_t j = 0; j < kPackBytes / 4; ++j) {
    to[j] = static_cast<uint16_t>(from[j]);
  }
}

}  // namespace
}  // namespace baseline
}  // namespace cpu
}  // namespace vecnorm

#include "kernels.inl"
