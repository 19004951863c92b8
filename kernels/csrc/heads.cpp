#include "heads.h"

#include <algorithm>
#include <cmath>

#include "philox.h"

namespace prudent {
namespace {

float softplus(float x) { return x > 20.0f ? x : std::log1p(std::exp(x)); }  // torch's threshold

// torch.argmin: NaN is the least, the lowest index on a tie.
int64_t argmin(const float* x, int64_t n) {
  int64_t best = 0;
  for (int64_t i = 1; i < n && !std::isnan(x[best]); ++i) {
    if (std::isnan(x[i]) || x[i] < x[best]) best = i;
  }
  return best;
}

int64_t argmax(const float* x, int64_t n) {
  int64_t best = 0;
  for (int64_t i = 1; i < n && !std::isnan(x[best]); ++i) {
    if (std::isnan(x[i]) || x[i] > x[best]) best = i;
  }
  return best;
}

float average(const float* x, int64_t n) {
  float total = 0;
  for (int64_t i = 0; i < n; ++i) total += x[i];
  return total / float(n);
}

float variance(const float* x, int64_t n, float mean) {
  float total = 0;
  for (int64_t i = 0; i < n; ++i) total += (x[i] - mean) * (x[i] - mean);
  return total / float(n);
}

// log sum_i exp(-x_i / b) and, into `shares` if given, the softmax of -x / b; as torch treats infinite maxima.
float log_sum_exp(const float* x, int64_t n, float b, float* shares) {
  float top = -INFINITY;
  for (int64_t i = 0; i < n; ++i) {
    const float y = -x[i] / b;
    if (std::isnan(y) || y > top) top = y;
    if (std::isnan(y)) break;
  }
  const float shift = shares == nullptr && std::isinf(top) ? 0 : top;
  float total = 0;
  for (int64_t i = 0; i < n; ++i) {
    const float e = std::exp(-x[i] / b - shift);
    if (shares != nullptr) shares[i] = e;
    total += e;
  }
  for (int64_t i = 0; i < n && shares != nullptr; ++i) shares[i] /= total;
  return std::log(total) + shift;
}

}  // namespace

Heads::Heads(const Options& options)
    : product(2 * options.heads),
      mean(options.heads),
      std(options.heads),
      o_(options),
      k_(options.heads),
      raw_std_(k_),
      noise_(k_),
      values_(k_),
      relative_(k_),
      to_mean_(k_),
      to_values_(k_),
      order_(k_) {}

void Heads::evaluate(int64_t row, const float* products, float square) {
  rstd = o_.normed ? 1.0f / std::sqrt(square / float(o_.dim) + o_.norm_eps) : 1.0f;
  for (int64_t j = 0; j < 2 * k_; ++j) product[j] = o_.normed ? products[j] * rstd : products[j];
  for (int64_t k = 0; k < k_; ++k) {
    mean[k] = product[k] + (o_.bias == nullptr ? 0 : o_.bias[k]);
    raw_std_[k] = product[k_ + k] + (o_.bias == nullptr ? 0 : o_.bias[k_ + k]);
    std[k] = softplus(raw_std_[k]) + o_.std_floor;
    if (o_.shift != nullptr) mean[k] -= o_.shift[k];
    if (o_.scale != nullptr) {
      mean[k] /= o_.scale[k];
      std[k] /= o_.scale[k];
    }
    if (o_.sampled) noise_[k] = normal(o_.seed, row * k_ + k);
    values_[k] = o_.sampled ? mean[k] + std[k] * noise_[k] : mean[k];
  }
}

int64_t Heads::nominal_index() {
  if (o_.nominal == kFixedHead) return o_.nominal_head;
  if (o_.nominal == kLeastStd) return argmin(std.data(), k_);
  for (int64_t k = 0; k < k_; ++k) relative_[k] = std[k] / o_.std_ref[k];
  return argmin(relative_.data(), k_);
}

float Heads::nominal_reward() {
  return o_.nominal == kMeanOfHeads ? average(mean.data(), k_) : mean[nominal_index()];
}

float Heads::reward() {
  const float c = float(o_.coefficient);
  const float* values = values_.data();
  switch (o_.kind) {
    case kNominal:
      return nominal_reward();
    case kTradeoff:
      return c * nominal_reward() + float(1.0 - o_.coefficient) * values[argmin(values, k_)];
    case kSoftmin:
      return -c * (log_sum_exp(values, k_, c, nullptr) - float(std::log(double(k_))));
    case kLcb:
    case kUwo: {
      const float centre = average(values, k_), spread = variance(values, k_, centre);
      return centre - c * (o_.kind == kLcb ? std::sqrt(spread) : spread);
    }
  }
  order_weights(to_values_.data());
  float total = 0;
  for (int64_t k = 0; k < k_; ++k) total += values[k] * to_values_[k];
  return total;
}

// The aggregations that are a fixed combination of the sorted heads, ties to the lowest index and NaN last.
void Heads::order_weights(float* weights) {
  const float* values = values_.data();
  std::fill_n(weights, k_, o_.kind == kMean ? 1.0f / float(k_) : 0.0f);
  if (o_.kind == kMean) return;
  if (o_.kind == kHead || o_.kind == kMax) {
    weights[o_.kind == kHead ? int64_t(o_.coefficient) : argmax(values, k_)] = 1;
    return;
  }
  for (int64_t k = 0; k < k_; ++k) order_[k] = k;
  std::sort(order_.begin(), order_.end(), [values](int64_t a, int64_t b) {
    const bool nan_a = std::isnan(values[a]), nan_b = std::isnan(values[b]);
    if (nan_a != nan_b) return nan_b;
    return nan_a || values[a] == values[b] ? a < b : values[a] < values[b];
  });
  if (o_.kind == kMin) weights[order_[0]] = 1;
  if (o_.kind == kMedian) {
    weights[order_[(k_ - 1) / 2]] += 0.5f;
    weights[order_[k_ / 2]] += 0.5f;
  }
  if (o_.kind == kCvar) {
    const int64_t tail = std::max<int64_t>(1, int64_t(std::ceil(o_.coefficient * double(k_) - 1e-9)));
    for (int64_t i = 0; i < tail; ++i) weights[order_[i]] = float(1.0 / double(tail));
  }
}

void Heads::reward_gradient() {
  const float c = float(o_.coefficient), n = float(k_);
  const float* values = values_.data();
  std::fill(to_mean_.begin(), to_mean_.end(), 0.0f);
  switch (o_.kind) {
    case kTradeoff:
    case kNominal: {
      const float lam = o_.kind == kTradeoff ? c : 1.0f;
      if (o_.nominal == kMeanOfHeads) {
        std::fill(to_mean_.begin(), to_mean_.end(), lam / n);
      } else {
        to_mean_[nominal_index()] = lam;
      }
      std::fill(to_values_.begin(), to_values_.end(), 0.0f);
      to_values_[argmin(values, k_)] = o_.kind == kTradeoff ? float(1.0 - o_.coefficient) : 0.0f;
      return;
    }
    case kSoftmin:
      log_sum_exp(values, k_, c, to_values_.data());
      return;
    case kLcb:
    case kUwo: {
      const float centre = average(values, k_), spread = std::sqrt(variance(values, k_, centre));
      for (int64_t k = 0; k < k_; ++k) {
        const float gap = values[k] - centre;
        // where all heads agree the std has a kink: subgradient 0 leaves them equal
        const float slope = o_.kind == kUwo ? 2.0f * gap / n : spread == 0 ? 0.0f : gap / (n * spread);
        to_values_[k] = 1.0f / n - c * slope;
      }
      return;
    }
  }
  order_weights(to_values_.data());
}

void Heads::product_gradient(float d_reward, const float* d_mean, int64_t mean_stride, const float* d_std,
                             int64_t std_stride, float* d_product) {
  reward_gradient();
  for (int64_t k = 0; k < k_; ++k) {
    float to_mean = (to_mean_[k] + to_values_[k]) * d_reward;
    float to_std = o_.sampled ? to_values_[k] * d_reward * noise_[k] : 0.0f;
    if (d_mean != nullptr) to_mean += d_mean[k * mean_stride];
    if (d_std != nullptr) to_std += d_std[k * std_stride];
    if (o_.scale != nullptr) {
      to_mean /= o_.scale[k];
      to_std /= o_.scale[k];
    }
    d_product[k] = to_mean;
    d_product[k_ + k] = to_std / (1.0f + std::exp(-raw_std_[k]));
  }
}

}  // namespace prudent
