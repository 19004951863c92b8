// Four floats by the vector extension of GCC and Clang, which becomes SSE2, NEON or scalar code. No fused multiply-add.
#pragma once

#include <string.h>

#include "kernels.h"

namespace prudent {
namespace {

typedef float F __attribute__((vector_size(16)));
constexpr int W = 4;
constexpr int kTileRows = 2;
constexpr int kTileColumns = 5;

inline uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}
inline float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

inline float widen(BFloat x) { return float_of(uint32_t(x.bits) << 16); }
inline float widen(Half x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
  if (magnitude >= 0x7c00) return float_of(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  // exponents rebased by a product, which also makes the subnormals normal
  return float_of(sign | bits_of(float_of(magnitude << 13) * 0x1p112f));
}

inline void narrow(float x, BFloat* out) {
  const uint32_t bits = bits_of(x);
  const bool nan = (bits & 0x7fffffff) > 0x7f800000;
  out->bits = uint16_t(nan ? bits >> 16 | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline void narrow(float x, Half* out) {
  const uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00;
  } else if (magnitude >= 0x477ff000) {
    half = 0x7c00;  // rounds to 2^16 or above
  } else if (magnitude < 0x38800000) {
    // below 2^-14: adding 0.5 leaves the subnormal's bits, rounded to even, at the low end
    half = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000;
  } else {
    half = (magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000) >> 13;
  }
  out->bits = uint16_t(sign | half);
}

inline F zero() { return F{0, 0, 0, 0}; }
inline F set1(float x) { return F{x, x, x, x}; }
inline F load(const float* p) {
  F v;
  memcpy(&v, p, sizeof v);
  return v;
}
inline F load(const BFloat* p) { return F{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])}; }
inline F load(const Half* p) { return F{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])}; }
inline void store(float* p, F v) { memcpy(p, &v, sizeof v); }
inline void store(BFloat* p, F v) {
  for (int i = 0; i < W; ++i) narrow(v[i], p + i);
}
inline void store(Half* p, F v) {
  for (int i = 0; i < W; ++i) narrow(v[i], p + i);
}
inline F add(F a, F b) { return a + b; }
inline F mul(F a, F b) { return a * b; }
inline F fma(F a, F b, F c) { return a * b + c; }

// Lane r: the sum of the vector at p + r * stride.
inline F sums_of(const float* p, int64_t stride) {
  F all;
  for (int r = 0; r < W; ++r) {
    const F v = load(p + r * stride);
    all[r] = (v[0] + v[1]) + (v[2] + v[3]);
  }
  return all;
}

}  // namespace
}  // namespace prudent
