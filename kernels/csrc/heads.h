// One row's products to its K Gaussians, its reward and the gradients of both: reference.py, a row at a time.
#pragma once

#include <cstdint>
#include <vector>

namespace prudent {

// The orders of spec.py: these integers come from there.
enum Kind : int64_t { kTradeoff, kNominal, kMean, kMin, kMax, kMedian, kLcb, kUwo, kSoftmin, kCvar, kHead };
enum Nominal : int64_t { kLeastStd, kRelativeStd, kMeanOfHeads, kFixedHead };
enum Centre : int64_t { kNone, kBatch, kGroup };

struct Options {
  int64_t heads;
  int64_t dim;
  int64_t kind;
  double coefficient;
  int64_t nominal;
  int64_t nominal_head;
  bool sampled;  // a seed is given and the aggregation takes the samples
  int64_t seed;
  float std_floor;
  bool normed;
  float norm_eps;
  const float* bias;  // [2K] or null, as the next three [K]
  const float* shift;
  const float* scale;
  const float* std_ref;
};

// A row's heads and the aggregation of them. Holds scratch: one per thread, any number of rows.
class Heads {
 public:
  explicit Heads(const Options& options);

  // products [2K] before the norm, square = sum of squares of the features; row is the noise's counter.
  void evaluate(int64_t row, const float* products, float square);
  float reward();
  // Fills to_mean and to_values: d reward / d mean through the nominal head alone, d reward / d value.
  void reward_gradient();
  // d_product [2K]: the gradient at the products after the norm, from d_reward (centred, d_sum added) and the rows of
  // d_mean, d_std with their strides (null = zero).
  void product_gradient(float d_reward, const float* d_mean, int64_t mean_stride, const float* d_std,
                        int64_t std_stride, float* d_product);

  std::vector<float> product, mean, std;  // product [2K] after the norm
  float rstd = 1;

 private:
  int64_t nominal_index();
  float nominal_reward();
  void order_weights(float* weights);

  const Options& o_;
  const int64_t k_;
  std::vector<float> raw_std_, noise_, values_, relative_, to_mean_, to_values_;
  std::vector<int64_t> order_;
};

}  // namespace prudent
