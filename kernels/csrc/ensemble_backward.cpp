// The backward of ensemble_reward: the work split over threads. No result depends on their number.
#include <algorithm>
#include <array>
#include <cstring>
#include <numeric>

#include "ensemble.h"

namespace prudent {
namespace {

using torch::stable::parallel_for;

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
        distance_(floats(grads.distance, 0)),
        saved_(static_cast<const float*>(saved.const_data_ptr())),
        extra_(call.options.trust != nullptr && needs.norm_weight ? call.rank() + 1 : 0),
        chunk_(chunk_rows(plan_.distinct(), (call.columns + extra_) / 2)),
        chunks_(std::max<int64_t>(1, (plan_.distinct() + chunk_ - 1) / chunk_)) {
    if (needs.hidden) call.pack(weights_, true);
    if (needs.hidden) call.pack_region(true);
    if (call.options.of_batch && call.num_rows > 0) {
      call.options.batch_worst = int64_t(saved_[call.saved_columns() - 1]);
    }
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
    const int64_t each = (call_.columns + extra_) * padded(call_.dim);
    Tensor partials = new_floats({partial ? chunks_ * each : 0});
    Tensor biases = new_floats({chunks_, call_.columns});
    parallel_for(0, chunks_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        chunk(i, partial ? data(partials) + i * each : nullptr, data(biases) + i * call_.columns);
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
    if (partial != nullptr) std::memset(partial, 0, size_t((columns + extra_) * padded(dim)) * sizeof(float));
    std::fill_n(bias, columns, 0.0f);
    Scratch scratch(call_);
    Coefficients found(columns, call_.rank());
    RegionGradient region{call_.region, found.pull.data(), found.scale.data(), found.directions.data()};
    GradientBlock gradient{};
    gradient.coefficient = found.columns.data();
    gradient.shrink = call_.options.normed && needs_.hidden ? found.shrink.data() : nullptr;
    gradient.need_dx = needs_.hidden;
    gradient.partial = partial;
    gradient.extra = extra_;
    gradient.region = call_.options.trust != nullptr && (needs_.hidden || extra_ > 0) ? &region : nullptr;
    for (int64_t first = index * chunk_; first < last; first += kRows) {
      gradient.rows = int(std::min<int64_t>(kRows, last - first));
      for (int r = 0; r < gradient.rows; ++r) {
        const int64_t row = plan_.row(first + r);
        gradient.x[r] = call_.row(row);
        gradient.dx[r] = dx_ == nullptr ? nullptr : dx_ + row * dim * size_of(call_.type);
      }
      coefficients(first, gradient.rows, scratch, found, bias);
      if (needs_.hidden || partial != nullptr) call_.isa.gradient[call_.type](weights_, gradient);
    }
  }

  // What GradientBlock and RegionGradient read, for the rows of a block.
  struct Coefficients {
    Coefficients(int64_t columns, int64_t rank) : columns(kRows * columns), directions(kRows * rank) {}
    std::vector<float> columns, directions;
    std::array<float, kRows> shrink, pull, scale;
  };

  // For stored rows first .. first + rows - 1 of the plan, summed over the positions that score each. Adds the positions'
  // gradients to `bias`.
  void coefficients(int64_t first, int rows, Scratch& s, Coefficients& out, float* bias) const {
    const int64_t columns = call_.columns, end = plan_.end(first + rows - 1);
    for (std::vector<float>* all : {&out.columns, &out.directions}) std::fill(all->begin(), all->end(), 0.0f);
    out.shrink.fill(0.0f);
    out.pull.fill(0.0f);
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
          out.columns[r * columns + j] += d_product * rstd;
          dot += d_product * s.lanes.product[j * kRows + lane];
        }
        if (call_.options.trust != nullptr) dot += pull(lane, r, rstd, s.lanes, out);
        out.shrink[r] += rstd * rstd * dot / float(call_.dim);
      }
    }
  }

  // Adds a position's gradient through its distance to the coefficients of stored row r; returns the gradient's product
  // with the features after the norm.
  float pull(int lane, int r, float rstd, const Lanes& lanes, Coefficients& out) const {
    const Trust& trust = *call_.options.trust;
    const float pull = lanes.pull[lane];
    out.pull[r] += pull * rstd * rstd;
    out.scale[r] = 1.0f / rstd;
    for (int64_t j = 0; j < trust.rank; ++j) {
      out.directions[r * trust.rank + j] += pull * rstd * trust.weights[j] * lanes.projections[j * kRows + lane];
    }
    return pull * (lanes.squared[lane] + lanes.along[lane]);
  }

  // Position n's products, rstd and outer gradients.
  void load_position(int64_t n, int lane, Scratch& s) const {
    const int64_t columns = call_.columns, heads = call_.options.heads, rank = call_.rank();
    const float* saved = saved_ + n * call_.saved_columns();
    s.row[lane] = n;
    for (int64_t j = 0; j < columns; ++j) s.lanes.product[j * kRows + lane] = saved[j];
    s.lanes.rstd[lane] = saved[columns];
    s.lanes.d_reward[lane] = d_reward_[n];
    for (int64_t k = 0; k < heads; ++k) {
      s.lanes.d_mean[k * kRows + lane] = mean_ ? mean_.data[n * mean_row_ + k * mean_.stride] : 0;
      s.lanes.d_std[k * kRows + lane] = std_ ? std_.data[n * std_row_ + k * std_.stride] : 0;
    }
    if (call_.options.trust == nullptr) return;
    for (int64_t j = 0; j < rank; ++j) s.lanes.projections[j * kRows + lane] = saved[columns + 1 + j];
    s.lanes.squared[lane] = saved[columns + 1 + rank];
    s.lanes.along[lane] = saved[columns + 2 + rank];
    s.lanes.d_distance[lane] = distance_ ? distance_[n] : 0;
  }

  void finish(const float* partials, MaybeTensor& weight, MaybeTensor& norm_weight) const {
    Finish f{};
    f.source = weights_.source;
    f.partials = partials;
    f.chunks = chunks_;
    f.extra = extra_;
    f.directions = call_.region.directions.source;
    f.directions.norm = nullptr;
    f.precision = call_.region.precision;
    f.weight = weight.has_value() ? weight->mutable_data_ptr() : nullptr;
    f.norm = norm_weight.has_value() ? norm_weight->mutable_data_ptr() : nullptr;
    f.norm_type = norm_weight.has_value() ? type_of(*norm_weight) : kFloat32;
    const int64_t grain = std::max<int64_t>(1, (1 << 17) / (kSlab * (call_.columns + extra_) * chunks_));
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
  const Strided<float> distance_;
  const float* saved_;  // [N, saved_columns], see contract.py
  const int64_t extra_;  // columns of the partials beside the weight's, see GradientBlock
  const int64_t chunk_, chunks_;
  char* dx_ = nullptr;
};

}  // namespace

std::tuple<MaybeTensor, MaybeTensor, MaybeTensor, MaybeTensor> ensemble_backward(
    const Arguments& a, const Gradients& grads, const Tensor& saved, const Needs& needs) {
  Call call(a);
  STD_TORCH_CHECK(saved.scalar_type() == ScalarType::Float && saved.dim() == 2 && saved.is_contiguous() &&
                      saved.size(0) == call.num_rows && saved.size(1) == call.saved_columns(),
                  "ensemble_reward: saved: expected the forward's saved tensor");
  return Backward(call, grads, saved, needs).run();
}

}  // namespace prudent
