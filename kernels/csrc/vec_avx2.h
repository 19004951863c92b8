// Eight floats: AVX2 with FMA and F16C.
#pragma once

#include <immintrin.h>
#include <string.h>

#include "kernels.h"

namespace prudent {
namespace {

using F = __m256;
constexpr int W = 8;
constexpr int kTileRows = 2;  // 2 x 5 accumulators, 2 rows and a weight in 16 registers
constexpr int kTileColumns = 5;

inline F zero() { return _mm256_setzero_ps(); }
inline F set1(float x) { return _mm256_set1_ps(x); }
inline __m128i load_bits(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
inline F load(const float* p) { return _mm256_loadu_ps(p); }
inline F load(const BFloat* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_bits(p)), 16));
}
inline F load(const Half* p) { return _mm256_cvtph_ps(load_bits(p)); }
inline void store(float* p, F v) { _mm256_storeu_ps(p, v); }
inline void store(BFloat* p, F v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i even = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(even, quiet, nan), 16);
  const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
}
inline void store(Half* p, F v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
inline F add(F a, F b) { return _mm256_add_ps(a, b); }
inline F mul(F a, F b) { return _mm256_mul_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }

// Lane r: the sum of the vector at p + r * stride, always in the same order: lanes 4 apart, then 2, then 1.
inline F sums_of(const float* p, int64_t stride) {
  F quarter[4];  // [i]: in 128-bit lane l, vector 4 l + i
  for (int i = 0; i < 4; ++i) {
    const F a = load(p + i * stride), b = load(p + (4 + i) * stride);
    quarter[i] = add(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
  }
  F half[2];
  for (int i = 0; i < 2; ++i) {
    const F a = quarter[2 * i], b = quarter[2 * i + 1];
    half[i] = add(_mm256_shuffle_ps(a, b, 0x44), _mm256_shuffle_ps(a, b, 0xee));
  }
  return add(_mm256_shuffle_ps(half[0], half[1], 0x88), _mm256_shuffle_ps(half[0], half[1], 0xdd));
}

}  // namespace
}  // namespace prudent
