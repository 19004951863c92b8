// The forward of ensemble_reward: the work split over threads. No result depends on their number.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "ensemble.h"

namespace prudent {
namespace {

using torch::stable::parallel_for;

// Stores lanes [count][kRows] as consecutive rows of `out`, `width` wide.
void store_rows(const float* lanes, int64_t count, int rows, float* out, int64_t width) {
  for (int r = 0; r < rows; ++r) {
    for (int64_t j = 0; j < count; ++j) out[r * width + j] = lanes[j * kRows + r];
  }
}

// The forward's outputs, null where not asked for; values [N, K] only for the worst head of the batch.
struct Outputs {
  float *reward, *mean, *std, *distance, *saved, *values;
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
  if (o.trust != nullptr) call.isa.measure(o, s.lanes);
  call.isa.evaluate(o, s.lanes);
  call.isa.aggregate(o, s.lanes);
  std::copy_n(s.lanes.reward, rows, out.reward + first);
  store_rows(s.lanes.mean, k, rows, out.mean + first * k, k);
  store_rows(s.lanes.std, k, rows, out.std + first * k, k);
  if (out.distance != nullptr) std::copy_n(s.lanes.distance, rows, out.distance + first);
  if (out.values != nullptr) store_rows(s.lanes.values, k, rows, out.values + first * k, k);
  if (out.saved == nullptr) return;
  if (!o.normed) std::fill_n(s.lanes.rstd, kRows, 1.0f);
  const int64_t wide = call.saved_columns(), rank = call.rank();
  float* saved = out.saved + first * wide;
  store_rows(s.lanes.product, 2 * k, rows, saved, wide);
  store_rows(s.lanes.rstd, 1, rows, saved + 2 * k, wide);
  if (o.trust == nullptr) return;
  store_rows(s.lanes.projections, rank, rows, saved + 2 * k + 1, wide);
  store_rows(s.lanes.squared, 1, rows, saved + 2 * k + 1 + rank, wide);
  store_rows(s.lanes.along, 1, rows, saved + 2 * k + 2 + rank, wide);
}

// BRME eq. 6: the head of the least mean over the batch, a NaN first and the lowest index on a tie. Adds its values to
// the rewards, by `share`, and keeps its index.
void take_worst(const Call& call, const Outputs& out, float share) {
  const int64_t n = call.num_rows, k = call.options.heads, wide = call.saved_columns();
  std::vector<double> sums(k);
  for (int64_t i = 0; i < n * k; ++i) sums[i % k] += out.values[i];
  int64_t worst = 0;
  for (int64_t j = 1; j < k; ++j) {
    if (!std::isnan(sums[worst]) && (std::isnan(sums[j]) || sums[j] < sums[worst])) worst = j;
  }
  for (int64_t i = 0; i < n; ++i) out.reward[i] += share * out.values[i * k + worst];
  for (int64_t i = 0; i < n && out.saved != nullptr; ++i) out.saved[(i + 1) * wide - 1] = float(worst);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, MaybeTensor, Tensor> ensemble_forward(const Arguments& a, bool keep) {
  Call call(a);
  const int64_t n = call.num_rows, k = call.options.heads;
  Tensor reward = new_floats({n}), mean = new_floats({n, k}), std = new_floats({n, k}), total = new_floats({});
  Tensor saved = new_floats({keep ? n : 0, call.saved_columns()});
  MaybeTensor distance;
  if (call.options.trust != nullptr) distance = new_floats({n});
  std::vector<float> values(a.of_batch ? n * k : 0);
  const Outputs out{data(reward), data(mean), data(std), distance ? data(*distance) : nullptr,
                    keep ? data(saved) : nullptr, a.of_batch ? values.data() : nullptr};
  if (n > 0) {
    Weights weights = call.fold();
    call.pack(weights, false);
    call.pack_region(false);
    // if there are few rows, smaller blocks give every thread some
    const int64_t each = (n + call.threads() - 1) / call.threads(), rows = std::min<int64_t>(kRows, (each + 3) / 4 * 4);
    parallel_for(0, (n + rows - 1) / rows, call.grain(rows), [&](int64_t begin, int64_t end) {
      Scratch scratch(call);
      for (int64_t first = begin * rows; first < std::min(n, end * rows); first += rows) {
        score(call, weights, first, int(std::min(rows, n - first)), scratch, out);
      }
    });
  }
  if (a.of_batch) take_worst(call, out, a.kind == kBatchWorst ? 1.0f : float(1.0 - a.coefficient));
  *data(total) = float(std::accumulate(out.reward, out.reward + n, 0.0));
  call.centre(out.reward);
  return {reward, mean, std, total, distance, saved};
}

}  // namespace prudent
