// The interface between the ops (*.cpp) and the loops that are compiled once per instruction set (kernels_*.h).
// It is plain data and function pointers. The units for wider instruction sets include nothing of the standard library,
// because the linker might keep their copy of an inline function for all units.
#pragma once

#include <stdint.h>

namespace prudent {

enum Type : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

constexpr int64_t kSlab = 32;     // features are padded to slabs: two AVX-512 vectors, one vdpbf16ps operand
constexpr int kRows = 16;         // rows in a block, which share each read of the weights
constexpr int64_t kMaxWidth = 16; // floats in the widest vector

inline constexpr int64_t padded(int64_t dim) { return (dim + kSlab - 1) / kSlab * kSlab; }

// The head's weight in the caller's layout, and the norm weight that multiplies it.
struct Source {
  const void* data;    // [columns, dim]
  int64_t row_stride;  // in elements
  int64_t col_stride;
  Type type;
  int64_t columns;
  int64_t dim;
  const float* norm;  // [padded(dim)] or null
};

// The folded weight in the order in which the loops read it; W floats to a vector, zeros past dim.
struct Weights {
  Source source;
  float* packed;  // [padded / W][columns][W], null if only `dots` is read
  BFloat* dots;   // [padded / 32][columns][32] for vdpbf16ps, or null
};

// The trust region in the order in which the loops read it. The arrays have padded(dim) floats, zeros past dim.
struct Region {
  const float* gain;    // the norm weight, or null
  const float* offset;  // -mean * rms: a feature's gap is t = x * gain + offset
  const float* precision;
  const float* mean;
  const float *root_gain, *root_offset, *root_mean;  // sqrt(precision) times gain (1 without a norm), offset, mean
  Weights directions;  // as given for the products with t, folded for dx
};

// The products of up to kRows rows with every column.
struct Block {
  const void* x[kRows];
  const void* next[kRows];  // the next block's rows, to prefetch, or null
  int rows;
  float* product;  // [rows][columns], or [columns][kRows]
  bool by_column;  // the second layout; entries of rows past the last are undefined
  float* square;   // [kRows] sums of squares, or null
  float* scratch;  // scratch_floats(columns), and region_floats(rank) with a region
  const Region* region;  // null without a trust region
  float* gaps;           // [2 + R][kRows]: sum precision t^2, sum precision mean t (with a norm), direction products
};

constexpr int64_t kMaxStretch = 1024;  // features that the loops take at once, see for_stretches
inline constexpr int64_t scratch_floats(int64_t columns) { return kRows * (columns + 1) * kMaxWidth; }
inline constexpr int64_t region_floats(int64_t rank) { return kRows * ((rank + 2) * kMaxWidth + kMaxStretch); }

// The orders of the tables in spec.py, whose indices these integers are.
enum Kind : int64_t {
  kTradeoff, kNominal, kMean, kMin, kMax, kMedian, kLcb, kUwo, kSoftmin, kCvar, kHead, kBatchWorst
};
enum Nominal : int64_t { kLeastStd, kRelativeStd, kMeanOfHeads, kFixedHead };
enum Centre : int64_t { kNone, kBatch, kGroup };

// What the distance needs beside the sums over the features.
struct Trust {
  int64_t rank;
  const float* weights;   // [R]
  const float* mean;      // [R] directions . mean
  float mean_square;      // sum precision mean^2
  float rms;
};

struct Options {
  int64_t heads;
  int64_t dim;
  int64_t kind;
  double coefficient;
  int64_t nominal;
  int64_t nominal_head;
  bool sampled;  // a seed is given and the aggregation uses samples
  int64_t seed;
  float std_floor;
  bool normed;
  float norm_eps;
  const float* bias;  // [2K] or null; the next three are [K] or null
  const float* shift;
  const float* scale;
  const float* std_ref;
  const Trust* trust;  // null without a trust region
  bool priced;         // price * max(distance - price_from, 0)^price_power
  float price, price_from;
  int64_t price_power;
  bool of_batch;  // the worst head is the batch's
  int64_t batch_worst;  // its index, for the gradients
};

// From the products of kRows rows to K Gaussians, rewards and the gradients of both, as in reference.py, with a row in
// each lane: every array is [...][kRows]. Lanes past the last row are undefined.
struct Lanes {
  int rows;
  const int64_t* row;  // the noise's counters
  float *square, *rstd, *reward, *d_reward;  // one each
  float *product, *d_product;                // 2K each; the product after the norm and before the bias
  float *mean, *std, *raw, *noise, *values, *relative;  // K each
  float *to_mean, *to_values;  // K each: d reward / d mean (only through the nominal head), d reward / d value
  float *d_mean, *d_std;       // K each
  // with a trust region; `pull` is d distance^2 / 2, by which the gradient pulls at the features
  float *squared, *along, *distance, *d_distance, *pull;  // one each
  float *gaps;                 // 2 + R, see Block
  float *projections;          // R: directions . (f - mean)
};

constexpr int64_t kLanesTrust = 7;  // arrays of kRows with a trust region, and two for each direction
constexpr int64_t kLanesFixed = 4, kLanesHead = 14;  // arrays of kRows in Lanes: a fixed number, and a number per head

// The trust region's part of a block's gradients: dx_r += pull[r] precision gain (gain x_r - scale[r] mean) +
// sum_j coefficient[r][j] V_j, with the directions V folded; `scale` is 1 / rstd.
struct RegionGradient {
  Region region;  // of its directions, the packed ones
  const float *pull, *scale;  // [rows]
  const float* coefficient;   // [rows][R]
};

// dx_r = sum_j coefficient[r][j] W_j - shrink[r] x_r, and dW_j += sum_r coefficient[r][j] x_r.
struct GradientBlock {
  const void* x[kRows];
  void* dx[kRows];
  int rows;
  const float* coefficient;  // [rows][columns]
  const float* shrink;       // [rows]; null without a norm: then x is read only for `partial`
  bool need_dx;
  float* partial;  // [padded / W][columns + extra][W], accumulated; null if not needed
  // with a norm's gradient through a trust region, extra = R + 1: sum_r coefficient[r][j] x_r for each direction, and
  // sum_r pull[r] x_r (gain x_r - scale[r] mean)
  int64_t extra;
  const RegionGradient* region;  // null without a trust region
};

// Adds the chunks' partials in order and unfolds the sum: dW = dW' * g, dg = sum_j dW'_j * W_j.
struct Finish {
  Source source;
  const float* partials;  // [chunks][padded / W][columns + extra][W]
  int64_t chunks;
  int64_t extra;            // see GradientBlock
  Source directions;        // bare; read if extra > 0
  const float* precision;
  void* weight;  // [columns, dim] contiguous, source.type; or null
  void* norm;    // [dim] contiguous, or null
  Type norm_type;
};

// The loops of one instruction set. `slab` ranges let the caller split the work over threads.
struct Isa {
  const char* name;
  bool dots;  // whether it multiplies bf16 features with a bf16 weight through `Weights::dots`
  void (*pack)(const Weights&, int64_t slab_begin, int64_t slab_end);
  void (*product[3])(const Weights&, const Block&);  // by Type
  void (*gradient[3])(const Weights&, const GradientBlock&);
  void (*finish)(const Finish&, int64_t slab_begin, int64_t slab_end);
  void (*normalise)(const Options&, Lanes&);  // square to rstd; multiplies the products by it
  void (*measure)(const Options&, Lanes&);    // gaps and rstd to projections, squared, along
  void (*evaluate)(const Options&, Lanes&);   // product to mean, std, raw, noise, values
  void (*aggregate)(const Options&, Lanes&);  // mean, std, values, squared to reward and distance
  void (*differentiate)(const Options&, Lanes&);  // d_reward, d_mean, d_std, d_distance to d_product and pull
  void (*words)(int64_t seed, const int64_t* counter, uint32_t* out);  // kRows counters to out [2][kRows]
};

extern const Isa kGeneric;
#ifdef PRUDENT_X86
extern const Isa kAvx2;
extern const Isa kAvx512;
extern const Isa kAvx512Bf16;
#endif

}  // namespace prudent
