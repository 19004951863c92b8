#include "call.h"

#include <algorithm>
#include <cmath>

namespace prudent {
namespace {

constexpr int64_t kThreadWork = int64_t(1) << 18;  // multiply-adds: fewer are not worth a thread

bool is_storage(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16;
}

const Isa& checked_isa(int64_t index) {
  const Isa* isa = isa_at(index);
  STD_TORCH_CHECK(isa != nullptr, "ensemble_reward: this machine lacks instruction set ", index);
  return *isa;
}

}  // namespace

void refuse_unless(bool ok, const char* argument) {
  STD_TORCH_CHECK(ok, "ensemble_reward: ", argument, ": outside the contract");
}

bool is(const MaybeTensor& t, int64_t length, ScalarType type) {
  return !t.has_value() || (t->dim() == 1 && t->size(0) == length && t->scalar_type() == type);
}

Strided<int64_t> indices(const MaybeTensor& t) {
  if (!t.has_value()) return {};
  STD_TORCH_CHECK(t->scalar_type() == ScalarType::Long && t->dim() == 1, "ensemble_reward: expected int64 indices");
  static const int64_t none = 0;  // an empty tensor's pointer may be null, but null means "not given" here
  if (t->numel() == 0) return {&none, 0};
  return {static_cast<const int64_t*>(t->const_data_ptr()), t->stride(0)};
}

Strided<float> floats(const MaybeTensor& t, int64_t dim) {
  if (!t.has_value()) return {};
  STD_TORCH_CHECK(t->scalar_type() == ScalarType::Float, "ensemble_reward: expected float32 vectors");
  static const float none = 0;
  if (t->numel() == 0) return {&none, 0};
  return {static_cast<const float*>(t->const_data_ptr()), t->dim() > dim ? t->stride(dim) : 0};
}

Type type_of(const Tensor& t) {
  const ScalarType type = t.scalar_type();
  if (type == ScalarType::Float) return kFloat32;
  if (type == ScalarType::Half) return kFloat16;
  STD_TORCH_CHECK(type == ScalarType::BFloat16, "ensemble_reward: expected bfloat16, float16 or float32");
  return kBFloat16;
}

int64_t size_of(Type type) { return type == kFloat32 ? 4 : 2; }

Tensor new_floats(std::vector<int64_t> shape) { return torch::stable::empty(shape, ScalarType::Float); }

Call::Call(const Arguments& arguments)
    : a(arguments),
      isa(checked_isa(a.isa)),
      type(type_of(a.hidden)),
      num_rows(0),
      stored_rows(0),
      columns(0),
      dim(0) {
  check_shapes();
  stored_rows = a.hidden.size(0);
  dim = a.hidden.size(1);
  columns = a.weight.size(0);
  rows = indices(a.rows);
  num_rows = rows ? a.rows->numel() : stored_rows;
  features_ = static_cast<const char*>(a.hidden.const_data_ptr());
  row_bytes_ = a.hidden.stride(0) * size_of(type);
  check_values();
  copies_.reserve(4);  // no reallocation: callers hold pointers into them
  options.heads = columns / 2;
  options.dim = dim;
  options.kind = a.kind;
  options.coefficient = a.coefficient;
  options.nominal = a.nominal;
  options.nominal_head = a.nominal_head;
  options.sampled = a.seed.has_value() && a.source_is_sample;
  options.seed = a.seed.has_value() ? indices(a.seed)[0] : 0;
  options.std_floor = float(a.std_floor);
  options.normed = a.norm_weight.has_value();
  options.norm_eps = float(a.norm_eps);
  options.bias = vector(a.bias);
  options.shift = vector(a.shift);
  options.scale = vector(a.scale);
  options.std_ref = vector(a.std_ref);
  options.of_batch = a.of_batch;
  if (a.trust_mean.has_value()) read_region();
}

void Call::check_shapes() const {
  refuse_unless(a.hidden.dim() == 2 && a.hidden.size(1) > 0, "hidden");
  const int64_t width = a.hidden.size(1);
  refuse_unless(width == 1 || a.hidden.stride(1) == 1, "hidden");
  refuse_unless(a.weight.dim() == 2 && is_storage(a.weight.scalar_type()), "weight");
  const int64_t heads = a.weight.size(0) / 2;
  refuse_unless(a.weight.size(1) == width && heads > 0 && a.weight.size(0) == 2 * heads, "weight");
  refuse_unless(is(a.bias, 2 * heads, ScalarType::Float), "bias");
  refuse_unless(!a.norm_weight || (is_storage(a.norm_weight->scalar_type()) &&
                                   is(a.norm_weight, width, a.norm_weight->scalar_type())), "norm_weight");
  refuse_unless(is(a.shift, heads, ScalarType::Float), "shift");
  refuse_unless(is(a.scale, heads, ScalarType::Float), "scale");
  refuse_unless(is(a.std_ref, heads, ScalarType::Float), "std_ref");
  refuse_unless(is(a.seed, 1, ScalarType::Long), "seed");
  refuse_unless(!a.rows || is(a.rows, a.rows->numel(), ScalarType::Long), "rows");
  const int64_t scored = a.rows ? a.rows->numel() : a.hidden.size(0);
  refuse_unless(is(a.group, scored, ScalarType::Long), "group");
  refuse_unless((a.group || a.group_size > 0) == (a.centre == kGroup) && a.group_size >= 0, "group");
  refuse_unless(a.group_size == 0 || scored % a.group_size == 0, "group");
  refuse_unless(std::isfinite(a.norm_eps) && a.norm_eps >= 0, "norm_eps");
  refuse_unless(std::isfinite(a.std_floor) && a.std_floor >= 0, "std_floor");
  refuse_unless(a.nominal != kFixedHead || a.nominal_head < heads, "aggregation");
  refuse_unless(a.kind != kHead || a.coefficient < double(heads), "aggregation");
  refuse_unless(a.nominal != kRelativeStd || a.std_ref, "std_ref");
  check_region();
}

void Call::check_values() const {
  for (int64_t n = 0; rows && n < num_rows; ++n) {
    STD_TORCH_CHECK(rows[n] >= 0 && rows[n] < stored_rows, "ensemble_reward: rows: ", rows[n], " is out of range");
  }
  const Strided<int64_t> group = indices(a.group);
  for (int64_t n = 0; group && n < num_rows; ++n) {
    STD_TORCH_CHECK(group[n] >= 0 && group[n] < num_rows, "ensemble_reward: group: ", group[n], " is out of range");
  }
  const Strided<float> scale = floats(a.scale, 0), std_ref = floats(a.std_ref, 0);
  for (int64_t k = 0; k < columns / 2; ++k) {
    refuse_unless(!scale || scale[k] > 0, "scale");
    refuse_unless(!std_ref || std_ref[k] > 0, "std_ref");
  }
}

const float* Call::vector(const MaybeTensor& t) {
  const Strided<float> values = floats(t, 0);
  if (!values || values.stride == 1) return values.data;
  copies_.emplace_back(t->numel());
  for (int64_t i = 0; i < t->numel(); ++i) copies_.back()[i] = values[i];
  return copies_.back().data();
}

void Call::fill(const Weights& w) const {
  const int64_t grain = std::max<int64_t>(1, (1 << 17) / (kSlab * w.source.columns));
  torch::stable::parallel_for(0, padded(dim) / kSlab, grain,
                              [&](int64_t begin, int64_t end) { isa.pack(w, begin, end); });
}

Weights Call::fold() {
  Weights w{};
  const Tensor& weight = a.weight;
  w.source = {weight.const_data_ptr(), weight.stride(0), weight.stride(1), type_of(weight), columns, dim, nullptr};
  if (options.normed) {
    const Tensor& gain = *a.norm_weight;
    Weights norm{};  // converts to fp32 as a weight of one column
    norm.source = {gain.const_data_ptr(), 0, gain.stride(0), type_of(gain), 1, dim, nullptr};
    owned_.push_back(new_floats({padded(dim)}));
    norm.packed = static_cast<float*>(owned_.back().mutable_data_ptr());
    fill(norm);
    w.source.norm = region.gain = norm.packed;
  }
  return w;
}

void Call::pack(Weights& w, bool for_dx) {
  const bool dots = isa.dots && type == kBFloat16 && w.source.type == kBFloat16 && !options.normed && !for_dx;
  owned_.push_back(torch::stable::empty({columns, padded(dim)}, dots ? ScalarType::BFloat16 : ScalarType::Float));
  if (dots) {
    w.dots = static_cast<BFloat*>(owned_.back().mutable_data_ptr());
  } else {
    w.packed = static_cast<float*>(owned_.back().mutable_data_ptr());
  }
  fill(w);
}

void Call::centre(float* values) const {
  if (a.centre == kNone || num_rows == 0) return;
  if (a.centre == kGroup && a.group.has_value()) {
    const Strided<int64_t> group = indices(a.group);
    std::vector<double> sums(num_rows), counts(num_rows);
    for (int64_t n = 0; n < num_rows; ++n) {
      sums[group[n]] += values[n];
      counts[group[n]] += 1;
    }
    for (int64_t n = 0; n < num_rows; ++n) values[n] -= float(sums[group[n]] / counts[group[n]]);
    return;
  }
  const int64_t size = a.centre == kBatch ? num_rows : a.group_size;
  for (int64_t begin = 0; begin < num_rows; begin += size) {
    double sum = 0;
    for (int64_t n = begin; n < begin + size; ++n) sum += values[n];
    for (int64_t n = begin; n < begin + size; ++n) values[n] -= float(sum / double(size));
  }
}

int64_t Call::threads() const {
  const int64_t work = num_rows * padded(dim) * columns / kThreadWork;
  return std::clamp<int64_t>(work, 1, torch::stable::get_num_threads());
}

int64_t Call::grain(int64_t block) const {
  return std::max<int64_t>(1, kThreadWork / (block * padded(dim) * columns));
}

Scratch::Scratch(const Call& call) {
  const bool trust = call.options.trust != nullptr;
  const int64_t heads = call.options.heads, rank = call.rank();
  const int64_t lanes_floats = kRows * (kLanesFixed + kLanesHead * heads + (trust ? kLanesTrust + 2 * rank : 0));
  memory_.reset(new float[lanes_floats + scratch_floats(call.columns) + (trust ? region_floats(rank) : 0)]);
  float* at = memory_.get();
  const auto take = [&](float** array, int64_t each) {
    *array = at;
    at += each * kRows;
  };
  for (float** one : {&lanes.square, &lanes.rstd, &lanes.reward, &lanes.d_reward}) take(one, 1);
  for (float** two : {&lanes.product, &lanes.d_product}) take(two, 2 * heads);
  for (float** each : {&lanes.mean, &lanes.std, &lanes.raw, &lanes.noise, &lanes.values, &lanes.relative,
                       &lanes.to_mean, &lanes.to_values, &lanes.d_mean, &lanes.d_std}) {
    take(each, heads);
  }
  if (trust) {
    for (float** one : {&lanes.squared, &lanes.along, &lanes.distance, &lanes.d_distance, &lanes.pull}) take(one, 1);
    take(&lanes.gaps, 2 + rank);
    take(&lanes.projections, rank);
    block.region = &call.region;
    block.gaps = lanes.gaps;
  }
  lanes.row = row;
  block.product = lanes.product;
  block.by_column = true;
  block.square = call.options.normed ? lanes.square : nullptr;
  block.scratch = at;
}

}  // namespace prudent
