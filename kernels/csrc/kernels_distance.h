// From the sums over the features to the distance from the trust region and its price, and back, as in trust.py, W rows
// at a time.
#pragma once

#include "kernels_lanes.h"

namespace prudent {
namespace {

// f - mean = rstd t + shift mean with shift = rstd rms - 1, so that the sums need not know rstd.
inline void measure_part(const Options& o, const Lanes& b, Part part) {
  const Trust& trust = *o.trust;
  const V rstd = o.normed ? part(b.rstd) : all(1.0f);
  const V shift = o.normed ? rstd * trust.rms - 1.0f : V{};
  V squared = part(b.gaps), along{};
  if (o.normed) {
    const V inner = rstd * part(b.gaps, 1);
    squared = rstd * rstd * squared + 2.0f * shift * inner + shift * shift * trust.mean_square;
    along = inner + shift * trust.mean_square;
  }
  for (int64_t r = 0; r < trust.rank; ++r) {
    const V projection = rstd * part(b.gaps, 2 + r) + shift * trust.mean[r];
    part.set(b.projections, r, projection);
    squared += trust.weights[r] * projection * projection;
    along += trust.weights[r] * projection * trust.mean[r];
  }
  part.set(b.squared, 0, squared);
  part.set(b.along, 0, along);
}

void measure(const Options& o, Lanes& b) {
  for_parts(b, [&](Part part) { measure_part(o, b, part); });
}

inline V distance_of(const Lanes& b, Part part) {
  const V squared = part(b.squared);
  return root(select(squared < 0.0f, V{}, squared));
}

// factor * beyond^power, beyond = max(distance - from, 0); NaN stays NaN.
inline V powered(V beyond, float factor, int64_t power) {
  V result = all(factor);
  for (int64_t i = 0; i < power; ++i) result *= beyond;
  return select(beyond <= 0.0f, V{}, result);
}

inline V price_of(const Options& o, V distance) { return powered(distance - o.price_from, o.price, o.price_power); }

// d_reward and d_distance to the pull at the features, which is 0 at distance 0 and at the edge of a hinge.
inline V pull_of(const Options& o, const Lanes& b, Part part) {
  const V distance = distance_of(b, part);
  V slope = part(b.d_distance);
  if (o.priced) {
    const float factor = o.price * float(o.price_power);
    slope -= part(b.d_reward) * powered(distance - o.price_from, factor, o.price_power - 1);
  }
  return select(distance == 0.0f, V{}, slope / distance);
}

}  // namespace
}  // namespace prudent
