// The trust region's part of a call: its checks and its tables.
#include <cmath>
#include <numeric>

#include "call.h"

namespace prudent {
namespace {

float number(const MaybeTensor& t) { return floats(t, 0)[0]; }

bool positive(float x) { return x > 0 && std::isfinite(x); }

}  // namespace

void Call::check_region() const {
  const bool given = a.trust_mean.has_value();
  refuse_unless(given || a.price < 0, "trust");
  for (const MaybeTensor* t : {&a.trust_precision, &a.trust_directions, &a.trust_weights, &a.trust_unit, &a.trust_rms}) {
    refuse_unless(t->has_value() == given, "trust");
  }
  if (!given) return;
  const Tensor& directions = *a.trust_directions;
  const int64_t width = a.hidden.size(1);
  refuse_unless(directions.dim() == 2 && directions.size(1) == width && directions.scalar_type() == ScalarType::Float,
                "trust.directions");
  refuse_unless(is(a.trust_mean, width, ScalarType::Float), "trust.mean");
  refuse_unless(is(a.trust_precision, width, ScalarType::Float), "trust.precision");
  refuse_unless(is(a.trust_weights, directions.size(0), ScalarType::Float), "trust.weights");
  refuse_unless(is(a.trust_unit, 1, ScalarType::Float) && positive(number(a.trust_unit)), "trust.unit");
  refuse_unless(is(a.trust_rms, 1, ScalarType::Float) && positive(number(a.trust_rms)), "trust.rms");
  const Strided<float> precision = floats(a.trust_precision, 0);
  bool fine = true;
  for (int64_t d = 0; d < width; ++d) fine &= precision[d] >= 0 && precision[d] <= __FLT_MAX__;
  refuse_unless(fine, "trust.precision");
}

float* Call::zeros(int64_t count) {
  tables_.emplace_back(new float[count]());
  return tables_.back().get();
}

void Call::read_region() {
  const int64_t wide = padded(dim);
  const Strided<float> means = floats(a.trust_mean, 0), precisions = floats(a.trust_precision, 0);
  const Strided<float> weights = floats(a.trust_weights, 0);
  const Tensor& directions = *a.trust_directions;
  trust_.rank = directions.size(0);
  trust_.rms = options.normed ? number(a.trust_rms) : 1.0f;
  float *mean = zeros(wide), *precision = zeros(wide), *offset = zeros(wide), *weight = zeros(trust_.rank);
  float *root_offset = zeros(wide), *root_mean = zeros(wide);
  double square = 0;
  for (int64_t d = 0; d < dim; ++d) {
    mean[d] = means[d];
    precision[d] = precisions[d];
    offset[d] = -mean[d] * trust_.rms;
    square += double(precision[d]) * mean[d] * mean[d];
    const float root = std::sqrt(precision[d]);
    root_offset[d] = root * offset[d];
    root_mean[d] = root * mean[d];
  }
  for (int64_t r = 0; r < trust_.rank; ++r) weight[r] = weights[r];
  trust_.mean_square = float(square);
  trust_.weights = weight;
  trust_.mean = direction_means_ = zeros(trust_.rank);
  options.trust = &trust_;
  options.priced = a.price >= 0;
  options.price = options.priced ? float(a.price * number(a.trust_unit)) : 0.0f;
  options.price_from = float(a.price_from);
  options.price_power = a.price_power;
  region.mean = mean;
  region.precision = precision;
  region.offset = offset;
  region.root_offset = root_offset;
  region.root_mean = root_mean;
  const void* data = trust_.rank == 0 ? nullptr : directions.const_data_ptr();
  region.directions.source = {data, directions.stride(0), directions.stride(1), kFloat32, trust_.rank, dim, nullptr};
}

void Call::pack_region(bool for_dx) {
  if (options.trust == nullptr) return;
  Weights& directions = region.directions;
  if (trust_.rank > 0) {
    directions.source.norm = for_dx ? region.gain : nullptr;
    owned_.push_back(new_floats({trust_.rank, padded(dim)}));
    directions.packed = static_cast<float*>(owned_.back().mutable_data_ptr());
    fill(directions);
  }
  if (for_dx) return;
  float* root_gain = zeros(padded(dim));
  for (int64_t d = 0; d < dim; ++d) {
    root_gain[d] = std::sqrt(region.precision[d]) * (region.gain == nullptr ? 1.0f : region.gain[d]);
  }
  region.root_gain = root_gain;
  direction_means();
}

void Call::direction_means() {
  const Source& s = region.directions.source;
  const float* data = static_cast<const float*>(s.data);
  for (int64_t r = 0; r < trust_.rank; ++r) {
    double parts[8] = {};  // independent sums hide the latency of an addition
    for (int64_t d = 0; d < dim; ++d) parts[d % 8] += double(data[r * s.row_stride + d * s.col_stride]) * region.mean[d];
    direction_means_[r] = float(std::accumulate(parts, parts + 8, 0.0));
  }
}

}  // namespace prudent
