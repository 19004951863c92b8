// Sixteen floats: AVX-512 F, BW, VL and DQ.
#pragma once

#include <immintrin.h>
#include <string.h>

#include "kernels.h"

namespace prudent {
namespace {

using F = __m512;
constexpr int W = 16;
constexpr int kTileRows = 4;  // 4 x 6 accumulators and 4 rows in 32 registers; the weight comes from memory
constexpr int kTileColumns = 6;

inline F zero() { return _mm512_setzero_ps(); }
inline F set1(float x) { return _mm512_set1_ps(x); }
inline __m256i load_bits(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline F load(const float* p) { return _mm512_loadu_ps(p); }
inline F load(const BFloat* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_bits(p)), 16));
}
inline F load(const Half* p) { return _mm512_cvtph_ps(load_bits(p)); }
inline void store(float* p, F v) { _mm512_storeu_ps(p, v); }
// Rounds to bf16, nearest even. It does not use vcvtneps2bf16, even if the machine has it, because that flushes
// subnormals.
inline __m256i narrow(F v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i even = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(even, nan, quiet), 16));
}
inline void store(BFloat* p, F v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(v)); }
inline void store(Half* p, F v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
inline F add(F a, F b) { return _mm512_add_ps(a, b); }
inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }

// Lane r: the sum of the vector at p + r * stride, always in the same order: lanes 8 apart, then 4, 2 and 1.
inline F sums_of(const float* p, int64_t stride) {
  F quarter[4];  // [i]: in 128-bit lane l, vector 4 l + i
  for (int i = 0; i < 4; ++i) {
    const F a = load(p + i * stride), b = load(p + (4 + i) * stride);
    const F c = load(p + (8 + i) * stride), d = load(p + (12 + i) * stride);
    const F low = add(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    const F high = add(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xee));
    quarter[i] = add(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd));
  }
  F half[2];
  for (int i = 0; i < 2; ++i) {
    const F a = quarter[2 * i], b = quarter[2 * i + 1];
    half[i] = add(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
  }
  return add(_mm512_shuffle_ps(half[0], half[1], 0x88), _mm512_shuffle_ps(half[0], half[1], 0xdd));
}

}  // namespace
}  // namespace prudent
