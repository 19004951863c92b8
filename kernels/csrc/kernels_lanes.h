// Arithmetic with a row in each lane, and the noise, written once in the vector extension of GCC and Clang. Each lane's
// operations, and so its bits, are the same in every instruction set.
#pragma once

#include "kernels.h"

namespace prudent {
namespace {

typedef float V __attribute__((vector_size(4 * W)));
typedef int32_t Mask __attribute__((vector_size(4 * W)));  // of a comparison: all bits or none
typedef uint32_t U __attribute__((vector_size(4 * W)));
typedef uint64_t L __attribute__((vector_size(8 * W)));

inline V get(const float* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}
inline void put(float* p, V v) { memcpy(p, &v, sizeof v); }
inline V all(float x) { return V{} + x; }

inline V select(Mask m, V a, V b) { return (V)((m & (Mask)a) | (~m & (Mask)b)); }
inline Mask is_nan(V x) { return x != x; }
inline V magnitude(V x) { return (V)((Mask)x & 0x7fffffff); }
inline V root(V x) {
  float lanes[W];
  put(lanes, x);
  for (int i = 0; i < W; ++i) lanes[i] = __builtin_sqrtf(lanes[i]);
  return get(lanes);
}

constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;

// e^x to two units in the last place: x = n ln 2 + r, and a polynomial in r (Cephes).
inline V exponential(V x) {
  V y = select(x > 89.0f, all(89.0f), x);
  y = select(y < -104.0f, all(-104.0f), y);
  const V n = (y * 1.44269504f + 12582912.0f) - 12582912.0f;  // to the nearest whole number
  const V r = (y - n * kLn2High) - n * kLn2Low;
  V p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  // 2^n in two steps, either of which is a normal number
  const Mask whole = __builtin_convertvector(select(is_nan(x), V{}, n), Mask), half = whole >> 1;
  const V result = p * (V)((half + 127) << 23) * (V)((whole - half + 127) << 23);
  return select(is_nan(x), x, result);
}

// log(1 + f) + e ln 2 for f in [sqrt(1/2) - 1, sqrt(2) - 1] (Cephes).
inline V log_near_one(V f, V e) {
  const V z = f * f;
  V p = f * 7.0376836292e-2f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  return (f + (f * z * p + e * kLn2Low - 0.5f * z)) + e * kLn2High;
}

// log x for x >= 0, not subnormal.
inline V logarithm(V x) {
  const Mask bits = (Mask)x;
  V e = __builtin_convertvector((bits >> 23) - 126, V), m = (V)((bits & 0x7fffff) | 0x3f000000);  // x = m 2^e
  const Mask low = m < 0.70710678f;
  e = select(low, e - 1.0f, e);
  m = select(low, m + m, m);
  const V result = select(x == 0.0f, all(-__builtin_inff()), log_near_one(m - 1.0f, e));
  return select((x < __builtin_inff()), result, x);  // infinity and NaN as they are
}

// log(1 + e^x), the identity above 20 as in torch.
inline V softplus(V x) {
  const V y = exponential(-magnitude(x));
  const Mask large = y > 0.41421356f;
  const V l = log_near_one(select(large, (y - 1.0f) * 0.5f, y), select(large, all(1.0f), V{}));
  return select(x <= 20.0f, select(x > 0.0f, x, V{}) + l, x);
}

// Philox-4x32 with 7 rounds, key = the seed's halves, counter = (low, high, 0, 0): words 0 and 1. The same bits as
// reference.py in torch and Triton on a GPU.
inline void philox(int64_t seed, L counter, U* w0, U* w1) {
  U c0 = __builtin_convertvector(counter, U), c1 = __builtin_convertvector(counter >> 32, U), c2{}, c3{};
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(uint64_t(seed) >> 32);
  for (int round = 0; round < 7; ++round) {
    const L a = __builtin_convertvector(c0, L) * 0xD2511F53u, b = __builtin_convertvector(c2, L) * 0xCD9E8D57u;
    c0 = __builtin_convertvector(b >> 32, U) ^ c1 ^ k0;
    c1 = __builtin_convertvector(b, U);
    c2 = __builtin_convertvector(a >> 32, U) ^ c3 ^ k1;
    c3 = __builtin_convertvector(a, U);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  *w0 = c0;
  *w1 = c1;
}

// 24 bits: exact in fp32, never 0 or 1.
inline V uniform(U word) { return __builtin_convertvector((Mask)(word >> 9), V) * 0x1p-23f + 0x1p-24f; }

// Box-Muller. cos(2 pi u) = sin(2 pi s) with s = |u - 1/2| - 1/4, which is exact; its Taylor series to s^13 is, for
// 2 pi |s| <= pi / 2.
inline V normal(int64_t seed, L counter) {
  U w0, w1;
  philox(seed, counter, &w0, &w1);
  const V t = (magnitude(uniform(w1) - 0.5f) - 0.25f) * 6.283185307179586f, z = t * t;
  V sine = z * 1.6059043837e-10f - 2.5052108385e-8f;
  sine = sine * z + 2.7557319224e-6f;
  sine = sine * z - 1.9841269841e-4f;
  sine = sine * z + 8.3333333333e-3f;
  sine = sine * z - 1.6666666667e-1f;
  sine = sine * z * t + t;
  return root(-2.0f * logarithm(uniform(w0))) * sine;
}

// W of a Lanes' rows: array i of [...][kRows].
struct Part {
  int64_t first;
  V operator()(const float* a, int64_t i = 0) const { return get(a + i * kRows + first); }
  void set(float* a, int64_t i, V v) const { put(a + i * kRows + first, v); }
};

template <class Body>
inline void for_parts(const Lanes& b, const Body& body) {
  for (int64_t first = 0; first < b.rows; first += W) body(Part{first});
}

}  // namespace
}  // namespace prudent
