// prudent_native::ensemble_reward_forward and _backward: the work split over threads, and their registration through
// LibTorch's stable ABI. No result depends on the number of threads.
#include <algorithm>
#include <array>
#include <cstring>
#include <numeric>
#include <tuple>

#include "call.h"

namespace prudent {
namespace {

using torch::stable::parallel_for;

float* data(Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

// Stores lanes [count][kRows] as consecutive rows of `out`, `width` wide.
void store_rows(const float* lanes, int64_t count, int rows, float* out, int64_t width) {
  for (int r = 0; r < rows; ++r) {
    for (int64_t j = 0; j < count; ++j) out[r * width + j] = lanes[j * kRows + r];
  }
}

// The forward's outputs; saved [N, 2K + 1] is null without `keep`.
struct Outputs {
  float *reward, *mean, *std, *saved;
};

void score(const Call& call, const Weights& weights, int64_t first, int rows, Scratch& s, const Outputs& out) {
  const Options& o = call.options;
  const int64_t k = o.heads;
  s.block.rows = s.lanes.rows = rows;
  for (int r = 0; r < rows; ++r) {
    s.row[r] = first + r;
    s.block.x[r] = call.row(call.rows ? call.rows[first + r] : first + r);
    const int64_t next = std::min(first + rows + r, call.num_rows - 1);
    s.block.next[r] = call.row(call.rows ? call.rows[next] : next);
  }
  call.isa.product[call.type](weights, s.block);
  if (o.normed) call.isa.normalise(o, s.lanes);
  call.isa.evaluate(o, s.lanes);
  call.isa.aggregate(o, s.lanes);
  std::copy_n(s.lanes.reward, rows, out.reward + first);
  store_rows(s.lanes.mean, k, rows, out.mean + first * k, k);
  store_rows(s.lanes.std, k, rows, out.std + first * k, k);
  if (out.saved == nullptr) return;
  if (!o.normed) std::fill_n(s.lanes.rstd, kRows, 1.0f);
  float* saved = out.saved + first * (2 * k + 1);
  store_rows(s.lanes.product, 2 * k, rows, saved, 2 * k + 1);
  store_rows(s.lanes.rstd, 1, rows, saved + 2 * k, 2 * k + 1);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(const Arguments& a, bool keep) {
  Call call(a);
  const int64_t n = call.num_rows, k = call.options.heads;
  Tensor reward = new_floats({n}), mean = new_floats({n, k}), std = new_floats({n, k}), total = new_floats({});
  Tensor saved = new_floats({keep ? n : 0, 2 * k + 1});
  const Outputs out{data(reward), data(mean), data(std), keep ? data(saved) : nullptr};
  if (n > 0) {
    Weights weights = call.fold();
    call.pack(weights, false);
    // if there are few rows, smaller blocks give every thread some
    const int64_t each = (n + call.threads() - 1) / call.threads(), rows = std::min<int64_t>(kRows, (each + 3) / 4 * 4);
    parallel_for(0, (n + rows - 1) / rows, call.grain(rows), [&](int64_t begin, int64_t end) {
      Scratch scratch(call);
      for (int64_t first = begin * rows; first < std::min(n, end * rows); first += rows) {
        score(call, weights, first, int(std::min(rows, n - first)), scratch, out);
      }
    });
  }
  *data(total) = float(std::accumulate(out.reward, out.reward + n, 0.0));
  call.centre(out.reward);
  return {reward, mean, std, total, saved};
}

// The stored rows that are scored, each once and in order, with the positions that score them: repeats of a row share
// its products, and their coefficients are added before the features are read again.
class Plan {
 public:
  explicit Plan(const Call& call) : call_(call), distinct_(call.num_rows) {
    const Strided<int64_t> rows = call.rows;
    bool increasing = true;
    for (int64_t n = 1; rows && n < distinct_ && increasing; ++n) increasing = rows[n - 1] < rows[n];
    if (increasing) return;
    order_.resize(distinct_);
    std::iota(order_.begin(), order_.end(), int64_t(0));
    std::stable_sort(order_.begin(), order_.end(), [&](int64_t i, int64_t j) { return rows[i] < rows[j]; });
    for (int64_t i = 0; i < distinct_; ++i) {
      if (i == 0 || rows[order_[i - 1]] != rows[order_[i]]) first_.push_back(i);
    }
    distinct_ = int64_t(first_.size());
    first_.push_back(int64_t(order_.size()));
  }
  int64_t distinct() const { return distinct_; }
  int64_t begin(int64_t i) const { return order_.empty() ? i : first_[i]; }
  int64_t end(int64_t i) const { return begin(i + 1); }
  int64_t position(int64_t at) const { return order_.empty() ? at : order_[at]; }
  int64_t row(int64_t i) const {
    const int64_t position = this->position(begin(i));
    return call_.rows ? call_.rows[position] : position;
  }

 private:
  const Call& call_;
  int64_t distinct_;
  std::vector<int64_t> order_, first_;
};

struct Gradients {
  MaybeTensor reward, mean, std, sum;
};
struct Needs {
  bool hidden, weight, bias, norm_weight;
};

// Zeros for the rows of dx [stored, dim] that no position scores.
void clear_unscored(const Call& call, const Plan& plan, char* dx, int64_t row_bytes) {
  if (!call.rows) return;
  const int64_t grain = std::max<int64_t>(1, (1 << 20) / row_bytes);
  parallel_for(0, call.stored_rows, grain, [&](int64_t begin, int64_t end) {
    int64_t low = 0, high = plan.distinct();
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      (plan.row(middle) < begin ? low : high) = plan.row(middle) < begin ? middle + 1 : middle;
    }
    for (int64_t at = begin; at < end; ++low) {
      const int64_t next = low < plan.distinct() ? std::min(end, plan.row(low)) : end;
      std::memset(dx + at * row_bytes, 0, size_t((next - at) * row_bytes));
      at = next + 1;
    }
  });
}

// The rows of a chunk depend only on shapes, and so does the order of sums. There are at most 64 chunks, whose partial
// sums are small beside the features: 8 K D bytes beside 2 D or 4 D for every row.
int64_t chunk_rows(int64_t distinct, int64_t heads) {
  const int64_t least = std::max<int64_t>(256, 32 * heads), rows = std::max(least, (distinct + 63) / 64);
  return (rows + kRows - 1) / kRows * kRows;
}

class Backward {
 public:
  Backward(Call& call, const Gradients& grads, const Tensor& saved, const Needs& needs)
      : call_(call),
        needs_(needs),
        plan_(call),
        weights_(call.fold()),
        d_reward_(call.num_rows),
        mean_(floats(grads.mean, 1)),
        std_(floats(grads.std, 1)),
        mean_row_(mean_ ? grads.mean->stride(0) : 0),
        std_row_(std_ ? grads.std->stride(0) : 0),
        saved_(static_cast<const float*>(saved.const_data_ptr())),
        chunk_(chunk_rows(plan_.distinct(), call.options.heads)),
        chunks_(std::max<int64_t>(1, (plan_.distinct() + chunk_ - 1) / chunk_)) {
    if (needs.hidden) call.pack(weights_, true);
    const Strided<float> reward = floats(grads.reward, 0), sum = floats(grads.sum, 0);
    for (int64_t n = 0; reward && n < call.num_rows; ++n) d_reward_[n] = reward[n];
    if (reward) call.centre(d_reward_.data());
    for (int64_t n = 0; sum && n < call.num_rows; ++n) d_reward_[n] += sum[0];
  }

  std::tuple<MaybeTensor, MaybeTensor, MaybeTensor, MaybeTensor> run() {
    MaybeTensor hidden, weight, bias, norm_weight;
    const Arguments& a = call_.a;
    if (needs_.hidden) {
      hidden = torch::stable::empty({call_.stored_rows, call_.dim}, a.hidden.scalar_type());
      dx_ = static_cast<char*>(hidden->mutable_data_ptr());
      clear_unscored(call_, plan_, dx_, call_.dim * size_of(call_.type));
    }
    const bool partial = needs_.weight || needs_.norm_weight;
    Tensor partials = new_floats({partial ? chunks_ * call_.columns * padded(call_.dim) : 0});
    Tensor biases = new_floats({chunks_, call_.columns});
    parallel_for(0, chunks_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        chunk(i, partial ? data(partials) + i * call_.columns * padded(call_.dim) : nullptr,
              data(biases) + i * call_.columns);
      }
    });
    if (needs_.bias) {
      bias = new_floats({call_.columns});
      for (int64_t j = 0; j < call_.columns; ++j) {
        double sum = 0;
        for (int64_t i = 0; i < chunks_; ++i) sum += data(biases)[i * call_.columns + j];
        data(*bias)[j] = float(sum);
      }
    }
    if (needs_.weight) weight = torch::stable::empty({call_.columns, call_.dim}, a.weight.scalar_type());
    if (needs_.norm_weight) norm_weight = torch::stable::empty({call_.dim}, a.norm_weight->scalar_type());
    if (partial) finish(data(partials), weight, norm_weight);
    return {hidden, weight, bias, norm_weight};
  }

 private:
  void chunk(int64_t index, float* partial, float* bias) const {
    const int64_t columns = call_.columns, dim = call_.dim, last = std::min(plan_.distinct(), (index + 1) * chunk_);
    if (partial != nullptr) std::memset(partial, 0, size_t(columns * padded(dim)) * sizeof(float));
    std::fill_n(bias, columns, 0.0f);
    Scratch scratch(call_);
    std::vector<float> coefficient(kRows * columns);
    std::array<float, kRows> shrink;
    GradientBlock gradient{};
    gradient.coefficient = coefficient.data();
    gradient.shrink = call_.options.normed && needs_.hidden ? shrink.data() : nullptr;
    gradient.need_dx = needs_.hidden;
    gradient.partial = partial;
    for (int64_t first = index * chunk_; first < last; first += kRows) {
      gradient.rows = int(std::min<int64_t>(kRows, last - first));
      for (int r = 0; r < gradient.rows; ++r) {
        const int64_t row = plan_.row(first + r);
        gradient.x[r] = call_.row(row);
        gradient.dx[r] = dx_ == nullptr ? nullptr : dx_ + row * dim * size_of(call_.type);
      }
      coefficients(first, gradient.rows, scratch, coefficient.data(), shrink.data(), bias);
      if (needs_.hidden || partial != nullptr) call_.isa.gradient[call_.type](weights_, gradient);
    }
  }

  // For stored rows first .. first + rows - 1 of the plan, summed over the positions that score each: coefficient
  // [rows][columns], and shrink [rows], the norm's term of dx. Adds the positions' gradients to `bias`.
  void coefficients(int64_t first, int rows, Scratch& s, float* coefficient, float* shrink, float* bias) const {
    const int64_t columns = call_.columns, end = plan_.end(first + rows - 1);
    std::fill_n(coefficient, rows * columns, 0.0f);
    std::fill_n(shrink, rows, 0.0f);
    int r = 0;
    for (int64_t at = plan_.begin(first); at < end; at += kRows) {
      s.lanes.rows = int(std::min<int64_t>(kRows, end - at));
      for (int lane = 0; lane < s.lanes.rows; ++lane) load_position(plan_.position(at + lane), lane, s);
      call_.isa.evaluate(call_.options, s.lanes);
      call_.isa.differentiate(call_.options, s.lanes);
      for (int lane = 0; lane < s.lanes.rows; ++lane) {
        while (at + lane >= plan_.end(first + r)) ++r;
        const float rstd = s.lanes.rstd[lane];
        float dot = 0;
        for (int64_t j = 0; j < columns; ++j) {
          const float d_product = s.lanes.d_product[j * kRows + lane];
          bias[j] += d_product;
          coefficient[r * columns + j] += d_product * rstd;
          dot += d_product * s.lanes.product[j * kRows + lane];
        }
        shrink[r] += rstd * rstd * dot / float(call_.dim);
      }
    }
  }

  // Position n's products, rstd and outer gradients.
  void load_position(int64_t n, int lane, Scratch& s) const {
    const int64_t columns = call_.columns, heads = call_.options.heads;
    const float* saved = saved_ + n * (columns + 1);
    s.row[lane] = n;
    for (int64_t j = 0; j < columns; ++j) s.lanes.product[j * kRows + lane] = saved[j];
    s.lanes.rstd[lane] = saved[columns];
    s.lanes.d_reward[lane] = d_reward_[n];
    for (int64_t k = 0; k < heads; ++k) {
      s.lanes.d_mean[k * kRows + lane] = mean_ ? mean_.data[n * mean_row_ + k * mean_.stride] : 0;
      s.lanes.d_std[k * kRows + lane] = std_ ? std_.data[n * std_row_ + k * std_.stride] : 0;
    }
  }

  void finish(const float* partials, MaybeTensor& weight, MaybeTensor& norm_weight) const {
    Finish f{};
    f.source = weights_.source;
    f.partials = partials;
    f.chunks = chunks_;
    f.weight = weight.has_value() ? weight->mutable_data_ptr() : nullptr;
    f.norm = norm_weight.has_value() ? norm_weight->mutable_data_ptr() : nullptr;
    f.norm_type = norm_weight.has_value() ? type_of(*norm_weight) : kFloat32;
    const int64_t grain = std::max<int64_t>(1, (1 << 17) / (kSlab * call_.columns * chunks_));
    parallel_for(0, padded(call_.dim) / kSlab, grain,
                 [&](int64_t begin, int64_t end) { call_.isa.finish(f, begin, end); });
  }

  Call& call_;
  const Needs needs_;
  const Plan plan_;
  Weights weights_;
  std::vector<float> d_reward_;
  const Strided<float> mean_, std_;
  const int64_t mean_row_, std_row_;
  const float* saved_;  // [N, 2K + 1]
  const int64_t chunk_, chunks_;
  char* dx_ = nullptr;
};

}  // namespace

#define PRUDENT_PARAMETERS                                                                                          \
  Tensor hidden, Tensor weight, MaybeTensor bias, MaybeTensor rows, MaybeTensor norm_weight, MaybeTensor seed,      \
      MaybeTensor shift, MaybeTensor scale, MaybeTensor std_ref, MaybeTensor group, int64_t group_size,             \
      double norm_eps, double std_floor, int64_t kind, double coefficient, bool source_is_sample, int64_t nominal,  \
      int64_t nominal_head, int64_t centre, int64_t isa
#define PRUDENT_ARGUMENTS                                                                                          \
  {hidden,     weight,   bias,      rows, norm_weight, seed,             shift,   scale,        std_ref, group,    \
   group_size, norm_eps, std_floor, kind, coefficient, source_is_sample, nominal, nominal_head, centre,  isa}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> ensemble_reward_forward(PRUDENT_PARAMETERS, bool keep) {
  return forward(PRUDENT_ARGUMENTS, keep);
}

std::tuple<MaybeTensor, MaybeTensor, MaybeTensor, MaybeTensor> ensemble_reward_backward(
    MaybeTensor grad_reward, MaybeTensor grad_mean, MaybeTensor grad_std, MaybeTensor grad_sum, PRUDENT_PARAMETERS,
    Tensor saved, bool need_hidden, bool need_weight, bool need_bias, bool need_norm_weight) {
  const Arguments arguments PRUDENT_ARGUMENTS;
  Call call(arguments);
  STD_TORCH_CHECK(saved.scalar_type() == ScalarType::Float && saved.dim() == 2 && saved.is_contiguous() &&
                      saved.size(0) == call.num_rows && saved.size(1) == call.columns + 1,
                  "ensemble_reward: saved: expected the forward's saved tensor");
  return Backward(call, {grad_reward, grad_mean, grad_std, grad_sum}, saved,
                  {need_hidden, need_weight, need_bias, need_norm_weight})
      .run();
}

int64_t supported_isas() {
  int64_t bits = 0;
  for (int i = 0; i < kIsas; ++i) bits |= int64_t(isa_at(i) != nullptr) << i;
  return bits;
}

// Increase it with every change of a schema below or of an argument's meaning; native.py has the same number.
int64_t version() { return 2; }

// For the tests: the noise's words 0 and 1 at counters first .. first + count - 1, [count, 2].
Tensor philox_words(Tensor seed, int64_t first, int64_t count, int64_t isa) {
  Tensor words = torch::stable::empty({count, 2}, ScalarType::Long);
  int64_t* out = static_cast<int64_t*>(words.mutable_data_ptr());
  int64_t counter[kRows];
  uint32_t found[2 * kRows];
  for (int64_t at = 0; at < count; at += kRows) {
    std::iota(counter, counter + kRows, first + at);
    isa_at(isa)->words(indices(seed)[0], counter, found);
    for (int64_t i = 0; i < std::min<int64_t>(kRows, count - at); ++i) {
      out[2 * (at + i)] = found[i];
      out[2 * (at + i) + 1] = found[kRows + i];
    }
  }
  return words;
}

#define PRUDENT_SCHEMA                                                                                                \
  "Tensor hidden, Tensor weight, Tensor? bias, Tensor? rows, Tensor? norm_weight, Tensor? seed, Tensor? shift, "      \
  "Tensor? scale, Tensor? std_ref, Tensor? group, int group_size, float norm_eps, float std_floor, int kind, "        \
  "float coefficient, bool source_is_sample, int nominal, int nominal_head, int centre, int isa"

STABLE_TORCH_LIBRARY(prudent_native, m) {
  m.def("ensemble_reward_forward(" PRUDENT_SCHEMA ", bool keep) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "ensemble_reward_backward(Tensor? grad_reward, Tensor? grad_mean, Tensor? grad_std, Tensor? grad_sum, "
      PRUDENT_SCHEMA
      ", Tensor saved, bool need_hidden, bool need_weight, bool need_bias, bool need_norm_weight) "
      "-> (Tensor?, Tensor?, Tensor?, Tensor?)");
  m.def("philox_words(Tensor seed, int first, int count, int isa) -> Tensor");
  m.def("version() -> int");
  m.def("supported_isas() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(prudent_native, CPU, m) {
  m.impl("ensemble_reward_forward", TORCH_BOX(&ensemble_reward_forward));
  m.impl("ensemble_reward_backward", TORCH_BOX(&ensemble_reward_backward));
  m.impl("philox_words", TORCH_BOX(&philox_words));
}

STABLE_TORCH_LIBRARY_IMPL(prudent_native, CompositeExplicitAutograd, m) {
  m.impl("supported_isas", TORCH_BOX(&supported_isas));
  m.impl("version", TORCH_BOX(&version));
}

}  // namespace prudent
