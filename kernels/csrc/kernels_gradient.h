// The backward's loops: dx from the packed weight, dW into a chunk's partial sums, and the sum of the partials.
#pragma once

#include "kernels_heads.h"
#include "kernels_product.h"

namespace prudent {
namespace {

constexpr int kUnroll = 2;  // vectors of features at once, whose independent sums hide the latency of multiply-adds
static_assert(kSlab % (kUnroll * W) == 0, "a stretch is a whole number of steps");

// total[r][u] += sum_j coefficient[r][j] w_j for R rows and kUnroll vectors of features
template <int R>
inline void add_columns(const float* w, int64_t columns, const float* coefficient, F (*total)[kUnroll]) {
  for (int64_t j = 0; j < columns; ++j) {
    for (int u = 0; u < kUnroll; ++u) {
      const F v = load(w + (u * columns + j) * W);
      for (int r = 0; r < R; ++r) total[r][u] = fma(set1(coefficient[r * columns + j]), v, total[r][u]);
    }
  }
}

// Rows first .. first + R - 1 of the block, features start .. start + length - 1.
template <class T, int R, bool kRegion>
inline void dx_tile(const GradientBlock& g, int first, int64_t start, const T* const* x, T* const* dx, int64_t length,
                    const float* w, int64_t columns) {
  const float* coefficient = g.coefficient + first * columns;
  for (int64_t d = 0; d < length; d += kUnroll * W, w += kUnroll * W * columns) {
    F total[R][kUnroll];
    for (int r = 0; r < R; ++r) {
      for (int u = 0; u < kUnroll; ++u) {
        total[r][u] = g.shrink == nullptr ? zero() : mul(set1(-g.shrink[first + r]), load(x[r] + d + u * W));
        if (kRegion) total[r][u] = region_dx(*g.region, first + r, start + d + u * W, x[r] + d + u * W, total[r][u]);
      }
    }
    add_columns<R>(w, columns, coefficient, total);
    if (kRegion) {
      const int64_t rank = g.region->region.directions.source.columns;
      const float* v = g.region->region.directions.packed + (start + d) * rank;
      add_columns<R>(v, rank, g.region->coefficient + first * rank, total);
    }
    for (int r = 0; r < R; ++r) {
      for (int u = 0; u < kUnroll; ++u) store(dx[r] + d + u * W, total[r][u]);
    }
  }
}

template <class T, int R>
inline int dx_rows(int r, const GradientBlock& g, int64_t start, const T* const* x, T* const* dx, int64_t length,
                   const float* w, int64_t columns) {
  for (; r + R <= g.rows; r += R) {
    g.region == nullptr ? dx_tile<T, R, false>(g, r, start, x + r, dx + r, length, w, columns)
                        : dx_tile<T, R, true>(g, r, start, x + r, dx + r, length, w, columns);
  }
  return r;
}

// `columns` of coefficient [rows][columns], `width` of partial [length / W][width][W]
template <class T, int C>
inline void dw_tile(const T* const* x, int rows, int64_t length, int64_t columns, int64_t width,
                    const float* coefficient, float* partial) {
  for (int64_t d = 0; d < length; d += kUnroll * W, partial += kUnroll * W * width) {
    F total[C][kUnroll];
    for (int c = 0; c < C; ++c) {
      for (int u = 0; u < kUnroll; ++u) total[c][u] = load(partial + (u * width + c) * W);
    }
    for (int r = 0; r < rows; ++r) {
      F v[kUnroll];
      for (int u = 0; u < kUnroll; ++u) v[u] = load(x[r] + d + u * W);
      for (int c = 0; c < C; ++c) {
        const F scale = set1(coefficient[r * columns + c]);
        for (int u = 0; u < kUnroll; ++u) total[c][u] = fma(scale, v[u], total[c][u]);
      }
    }
    for (int c = 0; c < C; ++c) {
      for (int u = 0; u < kUnroll; ++u) store(partial + (u * width + c) * W, total[c][u]);
    }
  }
}

template <class T, class... Args>
inline void dw_of(int64_t c, Args... args) {
  switch (c) {
    case 1: return dw_tile<T, 1>(args...);
    case 2: return dw_tile<T, 2>(args...);
    case 3: return dw_tile<T, 3>(args...);
    case 4: return dw_tile<T, 4>(args...);
    default: return dw_tile<T, 5>(args...);
  }
}

template <class T>
inline void dw_columns(const T* const* x, int rows, int64_t length, int64_t columns, int64_t width,
                       const float* coefficient, float* partial) {
  const int64_t tiles = (columns + 4) / 5, size = columns / tiles, wider = columns % tiles;
  for (int64_t t = 0, first = 0; t < tiles; ++t) {
    const int64_t count = size + (t < wider);
    dw_of<T>(count, x, rows, length, columns, width, coefficient + first, partial + first * W);
    first += count;
  }
}

template <class T>
void gradients(const Weights& w, const GradientBlock& g) {
  const int64_t columns = w.source.columns, dim = w.source.dim;
  const bool region = g.region != nullptr, read = g.shrink != nullptr || g.partial != nullptr || region;
  const int64_t rank = region ? g.region->region.directions.source.columns : 0, width = columns + g.extra;
  // without a read of x, iterate along dx, which has the same width
  const void* const* rows = read ? g.x : const_cast<const void* const*>(g.dx);
  for_stretches<T>(rows, g.rows, dim, columns + rank, read, [&](const T* const* x, int64_t d, int64_t length) {
    if (g.need_dx) {
      T last[kRows][kSlab];
      T* dx[kRows];
      const bool tail = d + length > dim;
      for (int r = 0; r < g.rows; ++r) dx[r] = tail ? last[r] : static_cast<T*>(g.dx[r]) + d;
      const float* at = w.packed + d * columns;
      int r = dx_rows<T, 4>(0, g, d, x, dx, length, at, columns);
      dx_rows<T, 1>(r, g, d, x, dx, length, at, columns);
      for (r = 0; r < g.rows && tail; ++r) {
        memcpy(static_cast<void*>(static_cast<T*>(g.dx[r]) + d), last[r], size_t(dim - d) * sizeof(T));
      }
    }
    if (g.partial == nullptr) return;
    float* partial = g.partial + d * width;
    dw_columns<T>(x, g.rows, length, columns, width, g.coefficient, partial);
    if (g.extra == 0) return;
    if (rank > 0) dw_columns<T>(x, g.rows, length, rank, width, g.region->coefficient, partial + columns * W);
    gain_column(*g.region, d, x, g.rows, length, width, partial + (columns + rank) * W);
  });
}

template <class T>
inline void store_part(T* p, F v, int64_t count) {
  if (count >= W) return store(p, v);
  T part[W];
  store(part, v);
  memcpy(static_cast<void*>(p), part, size_t(count) * sizeof(T));
}

inline void store_part(void* p, Type type, int64_t at, F v, int64_t count) {
  if (type == kFloat32) return store_part(static_cast<float*>(p) + at, v, count);
  if (type == kFloat16) return store_part(static_cast<Half*>(p) + at, v, count);
  return store_part(static_cast<BFloat*>(p) + at, v, count);
}

template <class T>
void finish_as(const Finish& f, int64_t slab_begin, int64_t slab_end) {
  const Source& s = f.source;
  Source bare = s;
  bare.norm = nullptr;
  const int64_t width = s.columns + f.extra, each = padded(s.dim) * width;
  const auto summed = [&](int64_t d, int64_t j) {
    const float* at = f.partials + d * width + j * W;
    F total = load(at);
    for (int64_t chunk = 1; chunk < f.chunks; ++chunk) total = add(total, load(at + chunk * each));
    return total;
  };
  for (int64_t d = slab_begin * kSlab; d < slab_end * kSlab && d < s.dim; d += W) {
    F gain = zero();
    for (int64_t j = 0; j < s.columns; ++j) {
      const F total = summed(d, j);
      if (f.norm != nullptr) gain = fma(total, folded<T>(bare, j, d), gain);
      if (f.weight == nullptr) continue;
      const F unfolded = s.norm == nullptr ? total : mul(total, load(s.norm + d));
      store_part(static_cast<T*>(f.weight) + j * s.dim + d, unfolded, s.dim - d);
    }
    for (int64_t r = 0; r + 1 < f.extra && f.norm != nullptr; ++r) {
      gain = fma(summed(d, s.columns + r), folded<float>(f.directions, r, d), gain);
    }
    if (f.extra > 0) gain = fma(summed(d, width - 1), load(f.precision + d), gain);
    if (f.norm != nullptr) store_part(f.norm, f.norm_type, d, gain, s.dim - d);
  }
}

void finish(const Finish& f, int64_t slab_begin, int64_t slab_end) {
  if (f.source.type == kFloat32) finish_as<float>(f, slab_begin, slab_end);
  if (f.source.type == kFloat16) finish_as<Half>(f, slab_begin, slab_end);
  if (f.source.type == kBFloat16) finish_as<BFloat>(f, slab_begin, slab_end);
}

}  // namespace

#ifdef PRUDENT_DOTS
constexpr bool kDots = true;
#else
constexpr bool kDots = false;
#endif

// Defines the only symbol of each unit.
#define PRUDENT_ISA(symbol, name)                                           \
  const Isa symbol = {name,                                                 \
                      kDots,                                                \
                      pack,                                                 \
                      {products<Multiply<float>>, products<Multiply<Half>>, bfloat_products}, \
                      {gradients<float>, gradients<Half>, gradients<BFloat>}, \
                      finish,                                               \
                      normalise,                                            \
                      measure,                                              \
                      evaluate,                                             \
                      aggregate,                                            \
                      differentiate,                                        \
                      words}

}  // namespace prudent
