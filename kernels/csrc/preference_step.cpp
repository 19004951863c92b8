// prudent_native::preference_step: a training step's loss and gradients from one read of the features. A block of eight
// pairs stays in the second-level cache between its products and its share of the gradient.
//
// Only what a pair trains is computed. Bradley-Terry needs the mean of the heads, which is one column: the mean of
// their weights. Eq. 8 needs one head: the pairs are sorted by head, and a block has that head's two columns. Penalties
// act on the mean of heads: one more column, and one or two directions of the gradient that all heads share.
// No result depends on the number of threads.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <numeric>
#include <tuple>

#include "call.h"
#include "philox.h"

namespace prudent {
namespace {

using torch::stable::parallel_for;

constexpr int64_t kBlockPairs = kRows / 2;

struct Step {
  Tensor features, weight, bias;
  MaybeTensor rows, head_id, p_hat, margin, seed;
  bool brme;
  double alpha, bsr, centre, std_floor;
  int64_t isa;
};

// The scalar sums of a chunk of pairs, over its pairs or rows.
struct Sums {
  double loss = 0, reward = 0, square = 0, std = 0, correct = 0;
  double mean_bias = 0, raw_bias = 0, shared_bias = 0;  // of d loss / d z: the own head's two, and all heads' means
};

// Pairs of one head (of all heads for Bradley-Terry), consecutive in the sorted order.
struct Chunk {
  int64_t group, begin, end;
};

class Run {
 public:
  explicit Run(const Step& s)
      : s_(s),
        isa_(checked_isa(s.isa)),
        type_(type_of(s.features)),
        rows_(indices(s.rows)),
        head_id_(indices(s.head_id)),
        p_hat_(floats(s.p_hat, 0)),
        margin_(floats(s.margin, 0)),
        seed_(s.seed.has_value() ? indices(s.seed)[0] : 0),
        heads_(s.weight.size(0) / 2),
        dim_(s.weight.size(1)),
        pairs_((s.rows.has_value() ? s.rows->numel() : s.features.size(0)) / 2),
        groups_(s.brme ? heads_ : 1),
        penalised_(s.bsr != 0 || s.centre != 0),
        columns_(s.brme ? 2 + penalised_ : 1),
        shared_(s.brme ? 2 : 0),
        directions_(s.brme ? 2 + (s.centre != 0) + (s.bsr != 0) : 1 + (s.bsr != 0)) {
    const int64_t stored = s.features.size(0);
    STD_TORCH_CHECK(s.features.size(1) == dim_ && s.bias.numel() == 2 * heads_, "preference_step: shapes do not fit");
    STD_TORCH_CHECK(dim_ == 1 || s.features.stride(1) == 1, "preference_step: features: last dimension not contiguous");
    for (int64_t n = 0; rows_ && n < 2 * pairs_; ++n) {
      STD_TORCH_CHECK(rows_[n] >= 0 && rows_[n] < stored, "preference_step: rows: ", rows_[n], " is out of range");
    }
    const Strided<float> bias = floats(s.bias, 0);
    for (int64_t j = 0; j < 2 * heads_; ++j) bias_.push_back(bias[j]);
    reward_bias_ = std::accumulate(bias_.begin(), bias_.begin() + heads_, 0.0f) / float(heads_);
    sort_pairs();
    pack();
  }

  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> run() {
    const int64_t each = directions_ * padded(dim_);
    Tensor partials = new_floats({int64_t(chunks_.size()), each});
    float* at = static_cast<float*>(partials.mutable_data_ptr());
    sums_.resize(chunks_.size());
    parallel_for(0, int64_t(chunks_.size()), grain(), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) chunk(chunks_[i], at + i * each, sums_[i]);
    });
    Sums total;
    for (const Sums& s : sums_) {
      total.loss += s.loss;
      total.reward += s.reward;
      total.square += s.square;
      total.std += s.std;
      total.correct += s.correct;
      total.shared_bias += s.shared_bias;
    }
    const double p = double(pairs_);
    Tensor loss = new_floats({}), accuracy = new_floats({}), std = new_floats({});
    double value = total.loss / p;
    if (s_.bsr != 0) value += s_.bsr / (4 * p) * total.reward * total.reward;
    if (s_.centre != 0) value += s_.centre / p * total.square;
    *static_cast<float*>(loss.mutable_data_ptr()) = float(value);
    *static_cast<float*>(accuracy.mutable_data_ptr()) = float(total.correct / p);
    *static_cast<float*>(std.mutable_data_ptr()) = float(total.std / (2 * p));
    return {loss, weight_gradient(at, total), bias_gradient(total), accuracy, std};
  }

 private:
  static const Isa& checked_isa(int64_t index) {
    const Isa* isa = isa_at(index);
    STD_TORCH_CHECK(isa != nullptr, "preference_step: this machine lacks instruction set ", index);
    return *isa;
  }

  int64_t row(int64_t n) const { return rows_ ? rows_[n] : n; }

  // Sorts the pairs stably by head, and splits each head's pairs into chunks; the split depends only on their number.
  void sort_pairs() {
    std::vector<int64_t> start(groups_ + 1);
    for (int64_t i = 0; i < pairs_; ++i) {
      const int64_t head = s_.brme ? head_id_[i] : 0;
      STD_TORCH_CHECK(head >= 0 && head < groups_, "preference_step: head_id: ", head, " is out of range");
      ++start[head + 1];
    }
    std::partial_sum(start.begin(), start.end(), start.begin());
    if (s_.brme) {
      order_.resize(pairs_);
      std::vector<int64_t> next(start.begin(), start.end() - 1);
      for (int64_t i = 0; i < pairs_; ++i) order_[next[head_id_[i]]++] = i;
    }
    // At most about 64 chunks, and a partial sum that is small beside the rows it adds up.
    const int64_t most = std::max<int64_t>(32, (pairs_ + 63) / 64);
    for (int64_t g = 0; g < groups_; ++g) {
      const int64_t count = start[g + 1] - start[g], pieces = (count + most - 1) / most;
      const int64_t even = pieces == 0 ? 0 : (count + pieces - 1) / pieces;
      const int64_t size = (even + kBlockPairs - 1) / kBlockPairs * kBlockPairs;
      first_chunk_.push_back(int64_t(chunks_.size()));
      for (int64_t at = start[g]; at < start[g + 1]; at += size) {
        chunks_.push_back({g, at, std::min(at + size, start[g + 1])});
      }
    }
    first_chunk_.push_back(int64_t(chunks_.size()));
  }

  // Row j of the weight in fp32, converted by packing it as a weight of one column.
  void read_row(int64_t j, float* out) const {
    const Tensor& w = s_.weight;
    const char* data = static_cast<const char*>(w.const_data_ptr()) + j * w.stride(0) * size_of(type_of(w));
    Weights one{};
    one.source = {data, 0, w.stride(1), type_of(w), 1, dim_, nullptr};
    one.packed = out;
    isa_.pack(one, 0, padded(dim_) / kSlab);
  }

  // Packs the columns of each group that the loss needs: the head's mean, its raw std, the mean of heads.
  void pack() {
    const int64_t wide = padded(dim_), needed = s_.brme ? 2 * heads_ : heads_;
    std::vector<float> plain(needed * wide), reward, source(columns_ * wide);
    parallel_for(0, needed, row_grain(), [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j) read_row(j, plain.data() + j * wide);
    });
    if (!s_.brme || penalised_) {
      reward.assign(plain.begin(), plain.begin() + wide);
      for (int64_t k = 1; k < heads_; ++k) {
        for (int64_t d = 0; d < wide; ++d) reward[d] += plain[k * wide + d];
      }
      for (int64_t d = 0; d < wide && heads_ > 1; ++d) reward[d] /= float(heads_);
    }
    packed_.resize(groups_ * columns_ * wide);
    for (int64_t g = 0; g < groups_; ++g) {
      const float* columns[3] = {plain.data() + g * wide, plain.data() + (heads_ + g) * wide, reward.data()};
      if (!s_.brme) columns[0] = reward.data();
      for (int64_t c = 0; c < columns_; ++c) std::copy_n(columns[c], wide, source.data() + c * wide);
      weights_.push_back({});
      Weights& w = weights_.back();
      w.source = {source.data(), wide, 1, kFloat32, columns_, dim_, nullptr};
      w.packed = packed_.data() + g * columns_ * wide;
      isa_.pack(w, 0, wide / kSlab);
    }
  }

  void chunk(const Chunk& c, float* partial, Sums& sums) const {
    std::memset(partial, 0, size_t(directions_ * padded(dim_)) * sizeof(float));
    std::vector<float> product(kRows * columns_), scratch(scratch_floats(columns_)), coefficient(kRows * directions_);
    Block block{};
    block.product = product.data();
    block.scratch = scratch.data();
    GradientBlock gradient{};
    gradient.coefficient = coefficient.data();
    gradient.partial = partial;
    Weights directions{};  // the gradient's loops read the number of columns and their length from a weight
    directions.source.columns = directions_;
    directions.source.dim = dim_;
    const char* features = static_cast<const char*>(s_.features.const_data_ptr());
    const int64_t row_bytes = s_.features.stride(0) * size_of(type_);
    for (int64_t first = c.begin; first < c.end; first += kBlockPairs) {
      const int64_t last = std::min(first + kBlockPairs, c.end);
      block.rows = gradient.rows = int(2 * (last - first));
      for (int r = 0; r < kRows; ++r) {
        const int64_t i = first + r / 2, side = r % 2;
        const auto at = [&](int64_t j) {
          return features + row(pair(std::min(j, c.end - 1)) + side * pairs_) * row_bytes;
        };
        block.x[r] = gradient.x[r] = at(i);
        block.next[r] = at(i + kBlockPairs);
      }
      isa_.product[type_](weights_[c.group], block);
      for (int64_t i = first; i < last; ++i) {
        const float* z = product.data() + 2 * (i - first) * columns_;
        float* out = coefficient.data() + 2 * (i - first) * directions_;
        s_.brme ? brme(pair(i), c.group, z, out, sums) : bradley_terry(pair(i), z, out, sums);
      }
      isa_.gradient[type_](directions, gradient);
    }
  }

  int64_t pair(int64_t i) const { return order_.empty() ? i : order_[i]; }

  // Products [2][columns] of a pair to coefficients [2][directions], and to the sums.
  void bradley_terry(int64_t i, const float* z, float* out, Sums& sums) const {
    const float chosen = z[0] + reward_bias_, rejected = z[1] + reward_bias_;
    const float x = (margin_ ? margin_[i] : 0.0f) - (chosen - rejected);
    // as in torch, softplus is the identity above 20, so its slope is 1 there
    const float slope = x > 20.0f ? 1.0f : 1.0f / (1.0f + std::exp(-x));
    sums.loss += x > 20.0f ? x : std::log1p(std::exp(x));
    sums.correct += chosen > rejected;
    penalties(chosen, rejected, out, sums);
    out[0] -= slope / float(pairs_);
    out[directions_] += slope / float(pairs_);
    sums.shared_bias += double(out[0]) + double(out[directions_]);
  }

  void brme(int64_t i, int64_t head, const float* z, float* out, Sums& sums) const {
    const float half = float(s_.alpha) * (p_hat_[i] - 0.5f), each = 2.0f / float(pairs_);
    float mean[2];
    for (int64_t side = 0; side < 2; ++side) {
      const float* at = z + side * columns_;
      const float raw = at[1] + bias_[heads_ + head];
      mean[side] = at[0] + bias_[head];
      const float std = (raw > 20.0f ? raw : std::log1p(std::exp(raw))) + float(s_.std_floor);
      float residual = mean[side] - (side == 0 ? half : -half), to_std = std;
      if (s_.seed.has_value()) {
        const float a = normal(seed_, (i + side * pairs_) * heads_ + head);
        residual += std * a;
        sums.loss += double(residual) * residual;
        to_std = residual * a;
      } else {
        sums.loss += double(residual) * residual + double(std) * std;
      }
      float* to = out + side * directions_;
      to[0] = residual * each;
      to[1] = to_std * each / (1.0f + std::exp(-raw));
      sums.std += std;
      sums.mean_bias += to[0];
      sums.raw_bias += to[1];
    }
    sums.correct += mean[0] > mean[1];
    if (!penalised_) return;
    penalties(z[2] + reward_bias_, z[columns_ + 2] + reward_bias_, out + shared_, sums);
    if (s_.centre != 0) sums.shared_bias += double(out[shared_]) + double(out[directions_ + shared_]);
  }

  // The coefficients that all heads' means share: d (loss + centring) / d reward, and 1 for batch-sum regularisation,
  // whose coefficient is known only after all rewards.
  void penalties(float chosen, float rejected, float* out, Sums& sums) const {
    const double both = double(chosen) + rejected;
    sums.reward += both;
    sums.square += both * both;
    for (int64_t side = 0; side < 2; ++side, out += directions_) {
      if (s_.centre != 0) *out = float(2 * s_.centre / double(pairs_) * both);
      if (s_.centre == 0 && !s_.brme) *out = 0;
      if (s_.bsr != 0) out[s_.centre != 0 || !s_.brme] = 1;
    }
  }

  Tensor weight_gradient(const float* partials, const Sums& total) {
    const int64_t each = directions_ * padded(dim_), lone = directions_ * dim_;
    Tensor sums = new_floats({groups_, lone}), result = new_floats({2 * heads_, dim_});
    float* sum = static_cast<float*>(sums.mutable_data_ptr());
    float* out = static_cast<float*>(result.mutable_data_ptr());
    const int64_t slabs = padded(dim_) / kSlab;
    // one read for each direction and chunk, one write for each head
    const int64_t work = kSlab * (directions_ * int64_t(chunks_.size()) + 2 * heads_);
    parallel_for(0, slabs, std::max<int64_t>(1, (1 << 17) / work), [&](int64_t begin, int64_t end) {
      for (int64_t g = 0; g < groups_; ++g) {
        Finish f{};
        f.source = {nullptr, 0, 1, kFloat32, directions_, dim_, nullptr};
        f.partials = partials + first_chunk_[g] * each;
        f.chunks = first_chunk_[g + 1] - first_chunk_[g];
        f.weight = sum + g * lone;
        if (!empty(g)) isa_.finish(f, begin, end);
      }
      const int64_t low = begin * kSlab, high = std::min(end * kSlab, dim_);
      combine(sum, low, high, total, out);
    });
    return result;
  }

  // The rows of the weight's gradient over features low .. high - 1, from the groups' sums [groups][directions][dim].
  void combine(const float* sum, int64_t low, int64_t high, const Sums& total, float* out) const {
    const int64_t lone = directions_ * dim_, count = high - low;
    std::vector<float> common(count);
    const auto add = [&](int64_t g, int64_t direction, float factor) {
      const float* at = sum + g * lone + direction * dim_ + low;
      for (int64_t d = 0; d < count; ++d) common[d] += factor * at[d];
    };
    const float each = 1.0f / float(heads_), batch = float(s_.bsr / (2 * double(pairs_)) * total.reward) * each;
    for (int64_t g = 0; g < groups_; ++g) {
      if (empty(g)) continue;
      if (!s_.brme || s_.centre != 0) add(g, shared_, each);
      if (s_.bsr != 0) add(g, directions_ - 1, batch);
    }
    for (int64_t k = 0; k < heads_; ++k) {
      float* mean = out + k * dim_ + low;
      float* raw = mean + heads_ * dim_;
      std::copy(common.begin(), common.end(), mean);
      std::fill_n(raw, count, 0.0f);
      if (!s_.brme || empty(k)) continue;
      const float* own = sum + k * lone + low;
      for (int64_t d = 0; d < count; ++d) mean[d] += own[d];
      std::copy_n(own + dim_, count, raw);
    }
  }

  bool empty(int64_t group) const { return first_chunk_[group] == first_chunk_[group + 1]; }

  Tensor bias_gradient(const Sums& total) const {
    Tensor result = new_floats({2 * heads_});
    float* out = static_cast<float*>(result.mutable_data_ptr());
    const double common = total.shared_bias + (s_.bsr != 0 ? s_.bsr * total.reward : 0);
    for (int64_t k = 0; k < heads_; ++k) {
      double mean = common / double(heads_), raw = 0;
      for (int64_t i = s_.brme ? first_chunk_[k] : 0; s_.brme && i < first_chunk_[k + 1]; ++i) {
        mean += sums_[i].mean_bias;
        raw += sums_[i].raw_bias;
      }
      out[k] = float(mean);
      out[heads_ + k] = float(raw);
    }
    return result;
  }

  // The chunks, or rows of the weight, that are worth a thread: about 10 us of work.
  int64_t grain() const {
    const int64_t rows = 2 * ((pairs_ + int64_t(chunks_.size()) - 1) / int64_t(chunks_.size()));
    return std::max<int64_t>(1, (int64_t(1) << 20) / (rows * padded(dim_) * (columns_ + directions_)));
  }
  int64_t row_grain() const { return std::max<int64_t>(1, (1 << 17) / padded(dim_)); }

  const Step& s_;
  const Isa& isa_;
  const Type type_;
  const Strided<int64_t> rows_, head_id_;
  const Strided<float> p_hat_, margin_;
  const int64_t seed_, heads_, dim_, pairs_, groups_;
  const bool penalised_;
  const int64_t columns_, shared_, directions_;  // shared_: the first direction that all heads share
  std::vector<float> bias_, packed_;
  float reward_bias_;
  std::vector<int64_t> order_, first_chunk_;  // order_ empty: unsorted
  std::vector<Chunk> chunks_;
  std::vector<Weights> weights_;
  std::vector<Sums> sums_;
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> preference_step(
    Tensor features, Tensor weight, Tensor bias, MaybeTensor rows, MaybeTensor head_id, MaybeTensor p_hat,
    MaybeTensor margin, MaybeTensor seed, bool brme, double alpha, double bsr, double centre, double std_floor,
    int64_t isa) {
  const Step step{features, weight, bias, rows, head_id, p_hat, margin, seed, brme, alpha, bsr, centre, std_floor, isa};
  return Run(step).run();
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(prudent_native, m) {
  m.def(
      "preference_step(Tensor features, Tensor weight, Tensor bias, Tensor? rows, Tensor? head_id, Tensor? p_hat, "
      "Tensor? margin, Tensor? seed, bool brme, float alpha, float bsr, float centre, float std_floor, int isa) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(prudent_native, CPU, m) { m.impl("preference_step", TORCH_BOX(&preference_step)); }

}  // namespace prudent
