// prudent_native::advantages: KL-shaped rewards, GAE and masked whitening. ../advantages/reference.py has the formulas.
// A thread takes whole sequences. Recurrence and statistics are in fp64, and the sequences' statistics are added in
// order, so no result depends on the number of threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

namespace prudent {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::parallel_for;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// The orders of ../advantages/contract.py.
enum Estimator : int64_t { kK1, kK2, kK3, kAbs };
enum Whiten : int64_t { kNone, kCentre, kSample, kPopulation };

struct Options {
  double gamma, decay, hole, kl_coef;  // decay = gamma lam; hole: a masked token multiplies the carry by it
  int64_t estimator;
  double kl_clip;
  bool after;
  int64_t whiten;
  double eps;
};

// One sequence's share of the batch's statistics; squares are about the sequence's mean.
struct Partial {
  double tokens = 0, mean = 0, squares = 0, kl = 0;
};

// Reads a tensor of any type and strides along its last dimension, as R.
class Reader {
 public:
  Reader() = default;
  explicit Reader(const MaybeTensor& t) {
    if (!t.has_value()) return;
    data_ = t->const_data_ptr();
    type_ = t->scalar_type();
    row_ = t->stride(0);
    column_ = t->dim() > 1 ? t->stride(1) : 0;
  }
  explicit operator bool() const { return data_ != nullptr; }

  template <class R>
  void read(int64_t row, int64_t begin, int64_t end, R* out) const {
    switch (type_) {
      case ScalarType::Float: return copy<float>(row, begin, end, out);
      case ScalarType::Double: return copy<double>(row, begin, end, out);
      case ScalarType::Half: return copy<torch::headeronly::Half>(row, begin, end, out);
      case ScalarType::BFloat16: return copy<torch::headeronly::BFloat16>(row, begin, end, out);
      case ScalarType::Bool: return copy<bool>(row, begin, end, out);
      default: STD_TORCH_CHECK(false, "advantages: expected a floating dtype");
    }
  }

 private:
  template <class S, class R>
  void copy(int64_t row, int64_t begin, int64_t end, R* out) const {
    const S* from = static_cast<const S*>(data_) + row * row_;
    if (column_ == 1) {
      for (int64_t t = begin; t < end; ++t) out[t] = static_cast<R>(from[t]);
    } else {
      for (int64_t t = begin; t < end; ++t) out[t] = static_cast<R>(from[t * column_]);
    }
  }

  const void* data_ = nullptr;
  ScalarType type_ = ScalarType::Float;
  int64_t row_ = 0, column_ = 0;
};

template <class R>
R kl_estimate(R d, int64_t estimator) {
  if (estimator == kK2) return d * d / 2;
  if (estimator == kAbs) return std::abs(d);
  // beyond 50, e^-d alone is the result, even in fp64; the minimum avoids inf - inf
  if (estimator == kK3) return std::expm1(-d) - (-d > R(50) ? R(50) : -d);
  return d;
}

template <class R>
class Sequences {
 public:
  Sequences(const Tensor& score, const MaybeTensor& logprob, const MaybeTensor& ref_logprob, const MaybeTensor& value,
            const Tensor& mask, const Options& options)
      : o_(options),
        batch_(mask.size(0)),
        length_(mask.size(1)),
        score_each_(score.dim() == 2),
        score_(score),
        logprob_(logprob),
        ref_logprob_(ref_logprob),
        value_(value),
        mask_(mask),
        partials_(batch_) {
    const ScalarType type = sizeof(R) == 8 ? ScalarType::Double : ScalarType::Float;
    for (Tensor* t : {&advantage_, &returns_, &reward_}) *t = torch::stable::empty({batch_, length_}, type);
    dropped_ = torch::stable::empty({batch_}, ScalarType::Bool);
    stats_ = torch::stable::empty({6}, type);
  }

  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> run() {
    // about 10 us of work: less is not worth a thread
    const int64_t grain = std::max<int64_t>(1, 4096 / length_);
    parallel_for(0, batch_, grain, [&](int64_t begin, int64_t end) {
      std::vector<R> scratch(4 * length_);
      std::vector<uint8_t> mask(length_);
      for (int64_t row = begin; row < end; ++row) sequence(row, mask.data(), scratch.data());
    });
    const auto [mean, scale] = total();
    if (o_.whiten != kNone) {
      parallel_for(0, batch_, 4 * grain, [&, mean = mean, scale = scale](int64_t begin, int64_t end) {
        std::vector<uint8_t> mask(length_);
        for (int64_t row = begin; row < end; ++row) {
          if (partials_[row].tokens == 0) continue;
          mask_.read(row, 0, length_, mask.data());
          R* out = at(advantage_, row);
          for (int64_t t = 0; t < length_; ++t) out[t] = mask[t] ? R((double(out[t]) - mean) * scale) : R(0);
        }
      });
    }
    return {advantage_, returns_, reward_, dropped_, stats_};
  }

 private:
  R* at(Tensor& t, int64_t row) const { return static_cast<R*>(t.mutable_data_ptr()) + row * length_; }

  // Rewards, advantages and returns of one sequence, and its share of the statistics.
  void sequence(int64_t row, uint8_t* mask, R* scratch) {
    R *reward = at(reward_, row), *returns = at(returns_, row), *advantage = at(advantage_, row);
    R *value = scratch, *kl = scratch + length_;
    std::fill_n(reward, length_, R(0));
    std::fill_n(returns, length_, R(0));
    std::fill_n(advantage, length_, R(0));
    static_cast<bool*>(dropped_.mutable_data_ptr())[row] = false;
    mask_.read(row, 0, length_, mask);
    int64_t first = 0, last = length_ - 1;
    while (last >= 0 && !mask[last]) --last;
    if (last < 0) return;
    while (!mask[first]) ++first;
    const int64_t score_step = o_.after && last + 1 < length_ ? last + 1 : last, end = score_step + 1;

    shape(row, first, end, score_step, mask, kl, scratch + 2 * length_, reward);
    if (value_) {
      value_.read(row, first, end, value);
    } else {
      std::fill(value + first, value + end, R(0));
    }

    Partial& partial = partials_[row];
    const double value_share = o_.gamma - o_.decay;
    double carry = 0, sum = 0;  // carry = gamma V_next + gamma lam A_next
    bool finite = true;
    for (int64_t t = score_step; t >= first; --t) {
      if (!mask[t] && t != score_step) {
        carry *= o_.hole;
        continue;
      }
      const double target = double(reward[t]) + carry, now = target - double(value[t]);
      returns[t] = R(target);
      carry = o_.decay * target + value_share * double(value[t]);
      if (!mask[t]) continue;
      advantage[t] = R(now);
      finite = finite && std::isfinite(advantage[t]);
      partial.tokens += 1;
      partial.kl += double(kl[t]);
      sum += now;
    }
    if (!finite) {
      partial = {};
      std::fill(reward + first, reward + end, R(0));
      std::fill(returns + first, returns + end, R(0));
      std::fill(advantage + first, advantage + end, R(0));
      static_cast<bool*>(dropped_.mutable_data_ptr())[row] = true;
      return;
    }
    partial.mean = sum / partial.tokens;
    for (int64_t t = first; t <= last; ++t) {
      const double off = double(advantage[t]) - partial.mean;
      partial.squares += mask[t] ? off * off : 0;
    }
  }

  // reward [begin, end) = score - kl_coef KL on the steps; other [2 length] is scratch.
  void shape(int64_t row, int64_t begin, int64_t end, int64_t score_step, const uint8_t* mask, R* kl, R* other,
             R* reward) {
    if (score_each_) {
      score_.read(row, begin, end, other);
      for (int64_t t = begin; t < end; ++t) reward[t] = mask[t] || t == score_step ? other[t] : R(0);
    } else {
      score_.read(row, 0, 1, other);
      reward[score_step] = other[0];
    }
    if (!logprob_) {
      std::fill(kl + begin, kl + end, R(0));
      return;
    }
    const R clip = R(o_.kl_clip), coef = R(o_.kl_coef);
    logprob_.read(row, begin, end, kl);
    ref_logprob_.read(row, begin, end, other);
    for (int64_t t = begin; t < end; ++t) {
      const R estimate = kl_estimate(mask[t] ? kl[t] - other[t] : R(0), o_.estimator);
      kl[t] = estimate > clip ? clip : estimate < -clip ? -clip : estimate;  // NaN stays
      reward[t] -= coef * kl[t];
    }
  }

  // Fills stats; returns the mean and the scale for whitening.
  std::pair<double, double> total() {
    double tokens = 0, sequences = 0, dropped = 0, sum = 0, kl = 0, squares = 0;
    for (int64_t row = 0; row < batch_; ++row) {
      const Partial& p = partials_[row];
      tokens += p.tokens;
      sequences += p.tokens > 0;
      dropped += static_cast<const bool*>(dropped_.const_data_ptr())[row];
      sum += p.tokens * p.mean;
      kl += p.kl;
    }
    const double some = std::max(tokens, 1.0), mean = sum / some;
    for (const Partial& p : partials_) squares += p.squares + p.tokens * (p.mean - mean) * (p.mean - mean);
    const double variance = squares / std::max(tokens - (o_.whiten == kPopulation ? 0 : 1), 1.0);
    R* out = static_cast<R*>(stats_.mutable_data_ptr());
    for (double value : {tokens, sequences, dropped, mean, std::sqrt(variance), kl / some}) *out++ = R(value);
    if (o_.whiten == kSample) return {mean, 1 / std::sqrt(variance + o_.eps)};
    if (o_.whiten == kPopulation) return {mean, 1 / std::sqrt(std::max(variance, o_.eps))};
    return {mean, 1};
  }

  const Options o_;
  const int64_t batch_, length_;
  const bool score_each_;
  const Reader score_, logprob_, ref_logprob_, value_, mask_;
  Tensor advantage_, returns_, reward_, dropped_, stats_;
  std::vector<Partial> partials_;
};

bool is_double(const MaybeTensor& t) { return t.has_value() && t->scalar_type() == ScalarType::Double; }

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> advantages(
    Tensor score, MaybeTensor logprob, MaybeTensor ref_logprob, MaybeTensor value, Tensor mask, double gamma,
    double decay, double hole, double kl_coef, int64_t kl_estimator, double kl_clip, bool after, int64_t whiten,
    double eps) {
  STD_TORCH_CHECK(mask.dim() == 2 && mask.scalar_type() == ScalarType::Bool && mask.numel() > 0,
                  "advantages: mask: expected bool [B, T], not empty");
  for (const MaybeTensor& t : {MaybeTensor(score), logprob, ref_logprob, value}) {
    const bool by_row = t.has_value() && t->dim() == 1 && t->size(0) == mask.size(0);
    const bool by_token = t.has_value() && t->dim() == 2 && t->size(0) == mask.size(0) && t->size(1) == mask.size(1);
    STD_TORCH_CHECK(!t.has_value() || by_row || by_token, "advantages: expected the shape of mask");
  }
  const Options options{gamma, decay, hole, kl_coef, kl_estimator, kl_clip, after, whiten, eps};
  if (is_double(score) || is_double(logprob) || is_double(ref_logprob) || is_double(value)) {
    return Sequences<double>(score, logprob, ref_logprob, value, mask, options).run();
  }
  return Sequences<float>(score, logprob, ref_logprob, value, mask, options).run();
}

STABLE_TORCH_LIBRARY_FRAGMENT(prudent_native, m) {
  m.def(
      "advantages(Tensor score, Tensor? logprob, Tensor? ref_logprob, Tensor? value, Tensor mask, float gamma, "
      "float decay, float hole, float kl_coef, int kl_estimator, float kl_clip, bool after, int whiten, float eps) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(prudent_native, CPU, m) { m.impl("advantages", TORCH_BOX(&advantages)); }

}  // namespace
}  // namespace prudent
