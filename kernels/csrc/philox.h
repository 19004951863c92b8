// The op's noise: Philox-4x32 with 7 rounds, key = the seed's halves, counter = (low, high, 0, 0). The same bits
// as reference.py in torch and Triton on a GPU.
#pragma once

#include <cmath>
#include <cstdint>

namespace prudent {

struct Words {
  uint32_t w[4];
};

inline Words philox(int64_t seed, int64_t counter) {
  uint32_t c0 = uint32_t(counter), c1 = uint32_t(uint64_t(counter) >> 32), c2 = 0, c3 = 0;
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(uint64_t(seed) >> 32);
  for (int round = 0; round < 7; ++round) {
    const uint64_t a = uint64_t(c0) * 0xD2511F53u, b = uint64_t(c2) * 0xCD9E8D57u;
    c0 = uint32_t(b >> 32) ^ c1 ^ k0;
    c1 = uint32_t(b);
    c2 = uint32_t(a >> 32) ^ c3 ^ k1;
    c3 = uint32_t(a);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// 24 bits: exact in fp32, never 0 or 1.
inline float uniform(uint32_t word) { return float(word >> 9) * 0x1p-23f + 0x1p-24f; }

inline float normal(int64_t seed, int64_t counter) {
  const Words words = philox(seed, counter);
  return std::sqrt(-2.0f * std::log(uniform(words.w[0]))) * std::cos(6.283185307179586f * uniform(words.w[1]));
}

}  // namespace prudent
