// The trust region's sums over features, in the forward and the backward.
#pragma once

#include "kernels.h"

namespace prudent {
namespace {

// sums [R][stride]: sum precision t^2, sum precision mean t; undefined before if `fresh`. kKeep: stores the gaps t
// [R][length] too.
template <class T, int R, bool kNorm, bool kKeep>
inline void gap_tile(const Region& g, int64_t first, int64_t length, const T* const* x, float* const* gaps, bool fresh,
                     float* sums, int64_t stride) {
  F total[R], along[R];
  for (int r = 0; r < R; ++r) {
    total[r] = fresh ? zero() : load(sums + r * stride);
    along[r] = fresh ? zero() : load(sums + r * stride + W);
  }
  for (int64_t d = first; d < first + length; d += W) {
    const F gain = load(g.root_gain + d), offset = load(g.root_offset + d);
    const F mean = kNorm ? load(g.root_mean + d) : zero();
    for (int r = 0; r < R; ++r) {
      const F v = load(x[r] + (d - first)), root = fma(v, gain, offset);
      total[r] = fma(root, root, total[r]);
      if (kNorm) along[r] = fma(root, mean, along[r]);
      if (!kKeep) continue;
      const F own = load(g.offset + d);
      store(gaps[r] + (d - first), kNorm ? fma(v, load(g.gain + d), own) : add(v, own));
    }
  }
  for (int r = 0; r < R; ++r) {
    store(sums + r * stride, total[r]);
    store(sums + r * stride + W, along[r]);
  }
}

template <class T, int R, class... Args>
inline void gap_tile_of(bool norm, bool keep, Args... args) {
  if (norm) {
    keep ? gap_tile<T, R, true, true>(args...) : gap_tile<T, R, true, false>(args...);
  } else {
    keep ? gap_tile<T, R, false, true>(args...) : gap_tile<T, R, false, false>(args...);
  }
}

template <class T>
inline void gap_sums(const Region& g, int64_t first, int64_t length, const T* const* x, float* const* gaps, int rows,
                     bool keep, bool fresh, float* sums, int64_t stride) {
  const bool norm = g.gain != nullptr;
  int r = 0;
  for (; r + 4 <= rows; r += 4) {
    gap_tile_of<T, 4>(norm, keep, g, first, length, x + r, gaps + r, fresh, sums + r * stride, stride);
  }
  for (; r < rows; ++r) {
    gap_tile_of<T, 1>(norm, keep, g, first, length, x + r, gaps + r, fresh, sums + r * stride, stride);
  }
}

// gain x - scale mean, which is the gap f - mean times scale = 1 / rstd.
template <class T>
inline F scaled_gap(const Region& g, int64_t d, const T* x, float scale) {
  const F v = load(x), lifted = g.gain == nullptr ? v : mul(v, load(g.gain + d));
  return fma(set1(-scale), load(g.mean + d), lifted);
}

// The trust region's share of dx at features d .. d + W - 1 of row r.
template <class T>
inline F region_dx(const RegionGradient& g, int r, int64_t d, const T* x, F total) {
  const Region& region = g.region;
  F pull = mul(set1(g.pull[r]), load(region.precision + d));
  if (region.gain != nullptr) pull = mul(pull, load(region.gain + d));
  return fma(pull, scaled_gap(region, d, x, g.scale[r]), total);
}

// partial [length / W][columns][W]: adds sum_r pull[r] x_r (gain x_r - scale[r] mean) to one column.
template <class T>
inline void gain_column(const RegionGradient& g, int64_t first, const T* const* x, int rows, int64_t length,
                        int64_t columns, float* partial) {
  for (int64_t d = 0; d < length; d += W, partial += columns * W) {
    F total = load(partial);
    for (int r = 0; r < rows; ++r) {
      const F gap = scaled_gap(g.region, first + d, x[r] + d, g.scale[r]);
      total = fma(mul(set1(g.pull[r]), load(x[r] + d)), gap, total);
    }
    store(partial, total);
  }
}

}  // namespace
}  // namespace prudent
