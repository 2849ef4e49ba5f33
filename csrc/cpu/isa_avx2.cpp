// Copyright (c) the torchrl_vecnorm authors.
//
// This source code is licensed under the MIT license found in the
// LICENSE file in the root directory of this source tree.

// The kernels for processors with AVX2 and FMA.

#if defined(__x86_64__)

#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "isa.h"
#include "plan.h"

// Only what follows may use these instructions: functions of the headers above are
// shared with the rest of the program, which may run where they do not exist.
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#define VECNORM_ISA avx2
constexpr int64_t kPackBytes = 32;
namespace vecnorm {
namespace cpu {
namespace avx2 {
namespace {

inline void stream(float* to, __m256 y) { _mm256_stream_ps(to, y); }
inline void stream(double* to, __m256d y) { _mm256_stream_pd(to, y); }
inline void flush_stream() { _mm_sfence(); }

// Whether no value is beyond the limit, and none is NaN.
inline bool all_within(__m256d pack, double limit) {
  return _mm256_movemask_pd(_mm256_cmp_pd(pack, _mm256_set1_pd(limit), _CMP_LE_OQ)) ==
         0xf;
}

inline void from_halves(const uint16_t* from, float* to) {
  const auto* halves = reinterpret_cast<const __m128i*>(from);
  _mm256_storeu_ps(to, _mm256_cvtph_ps(_mm_loadu_si128(halves)));
}

inline void to_halves(const float* from, uint16_t* to) {
  constexpr int rounding = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                   _mm256_cvtps_ph(_mm256_loadu_ps(from), rounding));
}

inline void from_integers(const uint8_t* from, float* to) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  _mm256_storeu_ps(to, _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes)));
}

inline void from_integers(const int8_t* from, float* to) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  _mm256_storeu_ps(to, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)));
}

inline void from_integers(const int16_t* from, float* to) {
  const __m128i shorts = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  _mm256_storeu_ps(to, _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(shorts)));
}

// Four bytes, and nothing beyond them.
inline __m128i four_bytes(const void* from) {
  int32_t bytes;
  std::memcpy(&bytes, from, sizeof(bytes));
  return _mm_cvtsi32_si128(bytes);
}

inline void from_integers(const uint8_t* from, double* to) {
  _mm256_storeu_pd(to, _mm256_cvtepi32_pd(_mm_cvtepu8_epi32(four_bytes(from))));
}

inline void from_integers(const int8_t* from, double* to) {
  _mm256_storeu_pd(to, _mm256_cvtepi32_pd(_mm_cvtepi8_epi32(four_bytes(from))));
}

inline void from_integers(const int16_t* from, double* to) {
  const __m128i shorts = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  _mm256_storeu_pd(to, _mm256_cvtepi32_pd(_mm_cvtepi16_epi32(shorts)));
}

// 16 bits to 32 and back.
inline void widen(const uint16_t* from, uint32_t* to) {
  const auto* bits = reinterpret_cast<const __m128i*>(from);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                      _mm256_cvtepu16_epi32(_mm_loadu_si128(bits)));
}

// A byte to 64 bits, a float to a double.
inline void widen(const uint8_t* from, int64_t* to) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                      _mm256_cvtepu8_epi64(four_bytes(from)));
}

inline void widen(const float* from, double* to) {
  _mm256_storeu_pd(to, _mm256_cvtps_pd(_mm_loadu_ps(from)));
}

inline void narrow(const uint32_t* from, uint16_t* to) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  // Packs each half of the register on its own.
  const __m256i packed = _mm256_packus_epi32(bits, bits);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                   _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
}

}  // namespace
}  // namespace avx2
}  // namespace cpu
}  // namespace vecnorm

#include "kernels.inl"

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
