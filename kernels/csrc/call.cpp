#include "call.h"

#include <algorithm>

namespace prudent {
namespace {

const Isa& checked_isa(int64_t index) {
  const Isa* isa = isa_at(index);
  STD_TORCH_CHECK(isa != nullptr, "ensemble_reward: this machine lacks instruction set ", index);
  return *isa;
}

}  // namespace

Strided<int64_t> indices(const MaybeTensor& t) {
  if (!t.has_value()) return {};
  STD_TORCH_CHECK(t->scalar_type() == ScalarType::Long && t->dim() == 1, "ensemble_reward: expected int64 indices");
  static const int64_t none = 0;  // an empty tensor's pointer may be null, which here means not given
  if (t->numel() == 0) return {&none, 0};
  return {static_cast<const int64_t*>(t->const_data_ptr()), t->stride(0)};
}

Strided<float> floats(const MaybeTensor& t, int64_t dim) {
  if (!t.has_value()) return {};
  STD_TORCH_CHECK(t->scalar_type() == ScalarType::Float, "ensemble_reward: expected float32 beside hidden");
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
      num_rows(a.rows.has_value() ? a.rows->numel() : a.hidden.size(0)),
      stored_rows(a.hidden.size(0)),
      columns(a.weight.size(0)),
      dim(a.hidden.size(1)),
      rows(indices(a.rows)),
      features_(static_cast<const char*>(a.hidden.const_data_ptr())),
      row_bytes_(a.hidden.stride(0) * size_of(type)) {
  STD_TORCH_CHECK(a.weight.size(1) == dim && columns % 2 == 0, "ensemble_reward: weight does not fit hidden");
  STD_TORCH_CHECK(dim == 1 || a.hidden.stride(1) == 1, "ensemble_reward: hidden's last dimension is not contiguous");
  for (int64_t n = 0; rows && n < num_rows; ++n) {
    STD_TORCH_CHECK(rows[n] >= 0 && rows[n] < stored_rows, "ensemble_reward: rows: ", rows[n], " is out of range");
  }
  copies_.reserve(4);  // pointers into them are handed out
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

Weights Call::pack(bool for_dx) {
  Weights w{};
  const Tensor& weight = a.weight;
  w.source = {weight.const_data_ptr(), weight.stride(0), weight.stride(1), type_of(weight), columns, dim, nullptr};
  if (options.normed) {
    const Tensor& gain = *a.norm_weight;
    Weights norm{};  // as fp32: a weight of one column
    norm.source = {gain.const_data_ptr(), 0, gain.stride(0), type_of(gain), 1, dim, nullptr};
    owned_.push_back(new_floats({padded(dim)}));
    norm.packed = static_cast<float*>(owned_.back().mutable_data_ptr());
    fill(norm);
    w.source.norm = norm.packed;
  }
  const bool dots = isa.dots && type == kBFloat16 && w.source.type == kBFloat16 && !options.normed;
  if (dots) {
    owned_.push_back(torch::stable::empty({columns, padded(dim)}, ScalarType::BFloat16));
    w.dots = static_cast<BFloat*>(owned_.back().mutable_data_ptr());
  }
  if (!dots || for_dx) {
    owned_.push_back(new_floats({columns, padded(dim)}));
    w.packed = static_cast<float*>(owned_.back().mutable_data_ptr());
  }
  fill(w);
  return w;
}

void Call::centre(float* values) const {
  if (a.centre == kNone || num_rows == 0) return;
  if (a.centre == kGroup && a.group.has_value()) {
    const Strided<int64_t> group = indices(a.group);
    std::vector<double> sums(num_rows), counts(num_rows);
    for (int64_t n = 0; n < num_rows; ++n) {
      STD_TORCH_CHECK(group[n] >= 0 && group[n] < num_rows, "ensemble_reward: group: ", group[n], " is out of range");
      sums[group[n]] += values[n];
      counts[group[n]] += 1;
    }
    for (int64_t n = 0; n < num_rows; ++n) values[n] -= float(sums[group[n]] / counts[group[n]]);
    return;
  }
  const int64_t size = a.centre == kBatch ? num_rows : a.group_size;
  STD_TORCH_CHECK(size > 0 && num_rows % size == 0, "ensemble_reward: group: size ", size, " does not divide the rows");
  for (int64_t begin = 0; begin < num_rows; begin += size) {
    double sum = 0;
    for (int64_t n = begin; n < begin + size; ++n) sum += values[n];
    for (int64_t n = begin; n < begin + size; ++n) values[n] -= float(sum / double(size));
  }
}

int64_t Call::grain(int64_t block) const {
  // about 10 us of multiply-adds: less is not worth waking a thread
  return std::max<int64_t>(1, (int64_t(1) << 20) / (block * padded(dim) * columns));
}

}  // namespace prudent
