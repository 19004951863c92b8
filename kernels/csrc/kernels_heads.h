// From products to Gaussians to rewards, and back, as in reference.py, W rows at a time.
#pragma once

#include "kernels_distance.h"

namespace prudent {
namespace {

void normalise(const Options& o, Lanes& b) {
  for_parts(b, [&](Part part) {
    const V rstd = 1.0f / root(part(b.square) / float(o.dim) + o.norm_eps);
    part.set(b.rstd, 0, rstd);
    for (int64_t j = 0; j < 2 * o.heads; ++j) part.set(b.product, j, part(b.product, j) * rstd);
  });
}

void evaluate(const Options& o, Lanes& b) {
  const int64_t heads = o.heads;
  for_parts(b, [&](Part part) {
    L counter{};
    for (int i = 0; i < W && o.sampled && part.first + i < b.rows; ++i) {
      counter[i] = uint64_t(b.row[part.first + i]) * uint64_t(heads);
    }
    for (int64_t k = 0; k < heads; ++k) {
      V mean = part(b.product, k), raw = part(b.product, heads + k);
      if (o.bias != nullptr) {
        mean += o.bias[k];
        raw += o.bias[heads + k];
      }
      V std = softplus(raw) + o.std_floor;
      if (o.shift != nullptr) mean -= o.shift[k];
      if (o.scale != nullptr) {
        mean /= o.scale[k];
        std /= o.scale[k];
      }
      part.set(b.raw, k, raw);
      part.set(b.mean, k, mean);
      part.set(b.std, k, std);
      if (o.sampled) {
        const V noise = normal(o.seed, counter + uint64_t(k));
        part.set(b.noise, k, noise);
        mean += std * noise;
      }
      part.set(b.values, k, mean);
    }
  });
}

// Like torch's argmin and argmax: a NaN wins, and the lowest index on a tie.
template <bool kGreatest = false>
inline V best(Part part, const float* values, int64_t heads, Mask* index) {
  V top = part(values);
  *index = Mask{};
  for (int64_t k = 1; k < heads; ++k) {
    const V v = part(values, k);
    const Mask better = ~is_nan(top) & (is_nan(v) | (kGreatest ? v > top : v < top));
    top = select(better, v, top);
    *index = (better & int32_t(k)) | (~better & *index);
  }
  return top;
}

inline V average(Part part, const float* values, int64_t heads) {
  V total = part(values);
  for (int64_t k = 1; k < heads; ++k) total += part(values, k);
  return total / float(heads);
}

inline V variance(Part part, const float* values, int64_t heads, V mean) {
  V total{};
  for (int64_t k = 0; k < heads; ++k) total += (part(values, k) - mean) * (part(values, k) - mean);
  return total / float(heads);
}

inline Mask nominal_index(const Options& o, const Lanes& b, Part part) {
  Mask index = Mask{} + int32_t(o.nominal_head);
  if (o.nominal == kFixedHead) return index;
  if (o.nominal == kRelativeStd) {
    for (int64_t k = 0; k < o.heads; ++k) part.set(b.relative, k, part(b.std, k) / o.std_ref[k]);
  }
  best(part, o.nominal == kRelativeStd ? b.relative : b.std, o.heads, &index);
  return index;
}

inline V nominal_reward(const Options& o, const Lanes& b, Part part) {
  if (o.nominal == kMeanOfHeads) return average(part, b.mean, o.heads);
  const Mask index = nominal_index(o, b, part);
  V found = part(b.mean);
  for (int64_t k = 1; k < o.heads; ++k) found = select(index == int32_t(k), part(b.mean, k), found);
  return found;
}

// -c log mean_k exp(-value_k / c) and, if asked, the softmax of -value / c into to_values; infinities as in torch.
template <bool kShares>
inline V soft_minimum(const Options& o, const Lanes& b, Part part) {
  const float c = float(o.coefficient);
  V top = all(-__builtin_inff());
  for (int64_t k = 0; k < o.heads; ++k) {
    const V y = -part(b.values, k) / c;
    top = select(~is_nan(top) & (is_nan(y) | (y > top)), y, top);
  }
  const V shift = kShares ? top : select(magnitude(top) == __builtin_inff(), V{}, top);
  V total{};
  for (int64_t k = 0; k < o.heads; ++k) {
    const V e = exponential(-part(b.values, k) / c - shift);
    if (kShares) part.set(b.to_values, k, e);
    total += e;
  }
  for (int64_t k = 0; kShares && k < o.heads; ++k) part.set(b.to_values, k, part(b.to_values, k) / total);
  return -c * ((logarithm(total) + shift) - logarithm(all(float(o.heads))));
}

// How many of the lowest heads `cvar` averages: spec.py's ceil(q K), with a tolerance for the product's rounding.
inline int64_t tail_of(const Options& o) {
  const int64_t tail = int64_t(__builtin_ceil(o.coefficient * double(o.heads) - 1e-9));
  return tail < 1 ? 1 : tail;
}

// The fixed weight of a head's rank for min, median and cvar; ties in the order of the heads and NaN last.
inline V rank_weight(const Options& o, const Lanes& b, Part part, int64_t k) {
  const V v = part(b.values, k);
  Mask rank{};
  for (int64_t j = 0; j < o.heads; ++j) {
    const V u = part(b.values, j);
    const Mask tie = (u == v) | (is_nan(u) & is_nan(v));
    rank -= (u < v) | (is_nan(v) & ~is_nan(u)) | (tie & (j < k ? -1 : 0));
  }
  const auto at = [&](int64_t wanted) { return (Mask)(rank == int32_t(wanted)); };
  if (o.kind == kMedian) {
    return select(at((o.heads - 1) / 2), all(0.5f), V{}) + select(at(o.heads / 2), all(0.5f), V{});
  }
  const int64_t tail = o.kind == kMin ? 1 : tail_of(o);
  return select(rank < int32_t(tail), all(float(1.0 / double(tail))), V{});
}

// d reward / d value of the aggregations that weight the heads by rank or index.
inline void order_weights(const Options& o, const Lanes& b, Part part) {
  Mask index = Mask{} + int32_t(o.coefficient);
  if (o.kind == kMax) best<true>(part, b.values, o.heads, &index);
  for (int64_t k = 0; k < o.heads; ++k) {
    V weight = select(index == int32_t(k), all(1.0f), V{});
    if (o.kind == kMean) weight = all(1.0f / float(o.heads));
    if (o.kind == kMin || o.kind == kMedian || o.kind == kCvar) weight = rank_weight(o, b, part, k);
    part.set(b.to_values, k, weight);
  }
}

inline V reward_of(const Options& o, const Lanes& b, Part part) {
  const float c = float(o.coefficient);
  if (o.kind == kNominal) return nominal_reward(o, b, part);
  if (o.kind == kBatchWorst) return V{};  // the worst head is known only after all rows
  if (o.kind == kTradeoff && o.of_batch) return c * nominal_reward(o, b, part);
  if (o.kind == kTradeoff) {
    Mask index;
    return c * nominal_reward(o, b, part) + float(1.0 - o.coefficient) * best(part, b.values, o.heads, &index);
  }
  if (o.kind == kSoftmin) return soft_minimum<false>(o, b, part);
  if (o.kind == kLcb || o.kind == kUwo) {
    const V mean = average(part, b.values, o.heads), spread = variance(part, b.values, o.heads, mean);
    return mean - c * (o.kind == kLcb ? root(spread) : spread);
  }
  order_weights(o, b, part);
  V total{};
  for (int64_t k = 0; k < o.heads; ++k) {
    // leave out heads of weight 0, because 0 * inf is NaN; but a NaN head makes the row NaN
    const V value = part(b.values, k), weight = part(b.to_values, k);
    total += select((weight == 0.0f) & ~is_nan(value), V{}, value * weight);
  }
  return total;
}

void aggregate(const Options& o, Lanes& b) {
  for_parts(b, [&](Part part) {
    V reward = reward_of(o, b, part);
    if (o.trust != nullptr) {
      const V distance = distance_of(b, part);
      part.set(b.distance, 0, distance);
      if (o.priced) reward -= price_of(o, distance);
    }
    part.set(b.reward, 0, reward);
  });
}

inline void reward_gradient(const Options& o, const Lanes& b, Part part) {
  const int64_t heads = o.heads;
  const float c = float(o.coefficient), n = float(heads);
  const bool with_nominal = o.kind == kTradeoff || o.kind == kNominal;
  for (int64_t k = 0; k < heads && !with_nominal; ++k) part.set(b.to_mean, k, V{});
  if (with_nominal) {
    const float lam = o.kind == kTradeoff ? c : 1.0f;
    Mask worst;
    const Mask nominal = nominal_index(o, b, part);
    best(part, b.values, heads, &worst);
    if (o.of_batch) worst = Mask{} + int32_t(o.batch_worst);
    for (int64_t k = 0; k < heads; ++k) {
      const V own = select(nominal == int32_t(k), all(lam), V{});
      const float share = o.kind == kTradeoff ? float(1.0 - o.coefficient) : 0.0f;
      part.set(b.to_mean, k, o.nominal == kMeanOfHeads ? all(lam / n) : own);
      part.set(b.to_values, k, select(worst == int32_t(k), all(share), V{}));
    }
  } else if (o.kind == kBatchWorst) {
    for (int64_t k = 0; k < heads; ++k) part.set(b.to_values, k, all(k == o.batch_worst ? 1.0f : 0.0f));
  } else if (o.kind == kSoftmin) {
    soft_minimum<true>(o, b, part);
  } else if (o.kind == kLcb || o.kind == kUwo) {
    const V mean = average(part, b.values, heads), spread = root(variance(part, b.values, heads, mean));
    for (int64_t k = 0; k < heads; ++k) {
      const V gap = part(b.values, k) - mean;
      // the std has a kink where all heads agree; the subgradient 0 leaves them equal
      const V slope = o.kind == kUwo ? 2.0f * gap / n : select(spread == 0.0f, V{}, gap / (n * spread));
      part.set(b.to_values, k, 1.0f / n - c * slope);
    }
  } else {
    order_weights(o, b, part);
  }
}

void differentiate(const Options& o, Lanes& b) {
  for_parts(b, [&](Part part) {
    reward_gradient(o, b, part);
    if (o.trust != nullptr) part.set(b.pull, 0, pull_of(o, b, part));
    const V d_reward = part(b.d_reward);
    for (int64_t k = 0; k < o.heads; ++k) {
      V mean = (part(b.to_mean, k) + part(b.to_values, k)) * d_reward, std{};
      if (o.sampled) std = part(b.to_values, k) * d_reward * part(b.noise, k);
      mean += part(b.d_mean, k);
      std += part(b.d_std, k);
      if (o.scale != nullptr) {
        mean /= o.scale[k];
        std /= o.scale[k];
      }
      part.set(b.d_product, k, mean);
      part.set(b.d_product, o.heads + k, std / (1.0f + exponential(-part(b.raw, k))));
    }
  });
}

void words(int64_t seed, const int64_t* counter, uint32_t* out) {
  for (int64_t first = 0; first < kRows; first += W) {
    L counters{};
    for (int i = 0; i < W; ++i) counters[i] = uint64_t(counter[first + i]);
    U w0, w1;
    philox(seed, counters, &w0, &w1);
    memcpy(out + first, &w0, sizeof w0);
    memcpy(out + kRows + first, &w1, sizeof w1);
  }
}

}  // namespace
}  // namespace prudent
