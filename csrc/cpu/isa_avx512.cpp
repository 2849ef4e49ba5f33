// Copyright (c) the torchrl_vecnorm authors.
//
// This source code is licensed under the MIT license found in the
// LICENSE file in the root directory of this source tree.

// The kernels for processors with AVX-512.

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
#pragma clang attribute push(                                                    \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
    apply_to = function)
#else
// GCC 12 warns about its own intrinsics (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

#define VECNORM_ISA avx512
constexpr int64_t kPackBytes = 64;
namespace vecnorm {
namespace cpu {
namespace avx512 {
namespace {

inline void stream(float* to, __m512 y) { _mm512_stream_ps(to, y); }
inline void stream(double* to, __m512d y) { _mm512_stream_pd(to, y); }
inline void flush_stream() { _mm_sfence(); }

// Whether no value is beyond the limit, and none is NaN.
inline bool all_within(__m512d pack, double limit) {
  return _mm512_cmp_pd_mask(pack, _mm512_set1_pd(limit), _CMP_LE_OQ) == 0xff;
}

inline void from_halves(const uint16_t* from, float* to) {
  const auto* halves = reinterpret_cast<const __m256i*>(from);
  _mm512_storeu_ps(to, _mm512_cvtph_ps(_mm256_loadu_si256(halves)));
}

inline void to_halves(const float* from, uint16_t* to) {
  constexpr int rounding = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                      _mm512_cvtps_ph(_mm512_loadu_ps(from), rounding));
}

inline void from_integers(const uint8_t* from, float* to) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  _mm512_storeu_ps(to, _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes)));
}

inline void from_integers(const int8_t* from, float* to) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  _mm512_storeu_ps(to, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)));
}

inline void from_integers(const int16_t* from, float* to) {
  const __m256i shorts = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  _mm512_storeu_ps(to, _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(shorts)));
}

inline void from_integers(const uint8_t* from, double* to) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  _mm512_storeu_pd(to, _mm512_cvtepi32_pd(_mm256_cvtepu8_epi32(bytes)));
}

inline void from_integers(const int8_t* from, double* to) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  _mm512_storeu_pd(to, _mm512_cvtepi32_pd(_mm256_cvtepi8_epi32(bytes)));
}

inline void from_integers(const int16_t* from, double* to) {
  const __m128i shorts = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  _mm512_storeu_pd(to, _mm512_cvtepi32_pd(_mm256_cvtepi16_epi32(shorts)));
}

// 16 bits to 32 and back.
inline void widen(const uint16_t* from, uint32_t* to) {
  const auto* bits = reinterpret_cast<const __m256i*>(from);
  _mm512_storeu_si512(to, _mm512_cvtepu16_epi32(_mm256_loadu_si256(bits)));
}

// A byte to 64 bits, a float to a double.
inline void widen(const uint8_t* from, int64_t* to) {
  const auto* bytes = reinterpret_cast<const __m128i*>(from);
  _mm512_storeu_si512(to, _mm512_cvtepu8_epi64(_mm_loadl_epi64(bytes)));
}

inline void widen(const float* from, double* to) {
  _mm512_storeu_pd(to, _mm512_cvtps_pd(_mm256_loadu_ps(from)));
}

inline void narrow(const uint32_t* from, uint16_t* to) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                      _mm512_cvtepi32_epi16(_mm512_loadu_si512(from)));
}

}  // namespace
}  // namespace avx512
}  // namespace cpu
}  // namespace vecnorm

#include "kernels.inl"

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
