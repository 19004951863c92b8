// What crosses between the op (ensemble_reward.cpp) and the loops compiled once per instruction set (kernels_impl.h).
// Plain data and function pointers: the units built with wider instructions include nothing of the standard library,
// because an inline function of theirs could be the copy that the linker keeps for everybody.
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
constexpr int kRows = 16;         // rows in a block: they share each read of the weights
constexpr int64_t kMaxWidth = 16; // floats in the widest vector

inline constexpr int64_t padded(int64_t dim) { return (dim + kSlab - 1) / kSlab * kSlab; }

// The head's weight as the caller has it, and the norm weight it is multiplied with.
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
  float* packed;  // [padded / W][columns][W], null where only `dots` is read
  BFloat* dots;   // [padded / 32][columns][32] for vdpbf16ps, or null
};

// The products of up to kRows rows with every column.
struct Block {
  const void* x[kRows];
  int rows;
  float* product;  // [rows][columns]
  float* square;   // [rows] sums of squares, or null
  float* scratch;  // scratch_floats(columns)
};

inline constexpr int64_t scratch_floats(int64_t columns) { return kRows * (columns + 1) * kMaxWidth; }

// dx_r = sum_j coefficient[r][j] W_j - shrink[r] x_r, and dW_j += sum_r coefficient[r][j] x_r.
struct GradientBlock {
  const void* x[kRows];
  void* dx[kRows];
  int rows;
  const float* coefficient;  // [rows][columns]
  const float* shrink;       // [rows], null without a norm
  bool need_dx;
  float* partial;  // [padded / W][columns][W], added to; null if not needed
};

// Sums the chunks' partials in their order and unfolds them: dW = dW' * g, dg = sum_j dW'_j * W_j.
struct Finish {
  Source source;
  const float* partials;  // [chunks][padded / W][columns][W]
  int64_t chunks;
  void* weight;  // [columns, dim] contiguous, source.type; or null
  void* norm;    // [dim] contiguous, or null
  Type norm_type;
};

// The loops of one instruction set. `slab` ranges let the caller split the work over threads.
struct Isa {
  const char* name;
  bool dots;  // multiplies bf16 features with a bf16 weight through `Weights::dots`
  void (*pack)(const Weights&, int64_t slab_begin, int64_t slab_end);
  void (*product[3])(const Weights&, const Block&);  // by Type
  void (*gradient[3])(const Weights&, const GradientBlock&);
  void (*finish)(const Finish&, int64_t slab_begin, int64_t slab_end);
};

extern const Isa kGeneric;
#ifdef PRUDENT_X86
extern const Isa kAvx2;
extern const Isa kAvx512;
extern const Isa kAvx512Bf16;
#endif

}  // namespace prudent
