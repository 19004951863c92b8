// The backward's loops: dx from the packed weight, dW into a chunk's partial sums, and the sum of the partials.
#pragma once

#include "kernels_heads.h"
#include "kernels_product.h"

namespace prudent {
namespace {

constexpr int kUnroll = 2;  // vectors of features at once, whose independent sums hide the latency of multiply-adds
static_assert(kSlab % (kUnroll * W) == 0, "a stretch is a whole number of steps");

template <class T, int R>
inline void dx_tile(const T* const* x, T* const* dx, int64_t length, const float* w, int64_t columns,
                    const float* coefficient, const float* shrink) {
  for (int64_t d = 0; d < length; d += kUnroll * W, w += kUnroll * W * columns) {
    F total[R][kUnroll];
    for (int r = 0; r < R; ++r) {
      for (int u = 0; u < kUnroll; ++u) {
        total[r][u] = shrink == nullptr ? zero() : mul(set1(-shrink[r]), load(x[r] + d + u * W));
      }
    }
    for (int64_t j = 0; j < columns; ++j) {
      for (int u = 0; u < kUnroll; ++u) {
        const F v = load(w + (u * columns + j) * W);
        for (int r = 0; r < R; ++r) total[r][u] = fma(set1(coefficient[r * columns + j]), v, total[r][u]);
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int u = 0; u < kUnroll; ++u) store(dx[r] + d + u * W, total[r][u]);
    }
  }
}

template <class T, int R>
inline int dx_rows(int r, const GradientBlock& g, const T* const* x, T* const* dx, int64_t length, const float* w,
                   int64_t columns) {
  for (; r + R <= g.rows; r += R) {
    const float* shrink = g.shrink == nullptr ? nullptr : g.shrink + r;
    dx_tile<T, R>(x + r, dx + r, length, w, columns, g.coefficient + r * columns, shrink);
  }
  return r;
}

template <class T, int C>
inline void dw_tile(const T* const* x, int rows, int64_t length, int64_t columns, const float* coefficient,
                    float* partial) {
  for (int64_t d = 0; d < length; d += kUnroll * W, partial += kUnroll * W * columns) {
    F total[C][kUnroll];
    for (int c = 0; c < C; ++c) {
      for (int u = 0; u < kUnroll; ++u) total[c][u] = load(partial + (u * columns + c) * W);
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
      for (int u = 0; u < kUnroll; ++u) store(partial + (u * columns + c) * W, total[c][u]);
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
void gradients(const Weights& w, const GradientBlock& g) {
  const int64_t columns = w.source.columns, dim = w.source.dim;
  const int64_t tiles = (columns + 4) / 5, size = columns / tiles, wider = columns % tiles;
  const bool read = g.shrink != nullptr || g.partial != nullptr;
  // without a read of x, iterate along dx, which has the same width
  const void* const* rows = read ? g.x : const_cast<const void* const*>(g.dx);
  for_stretches<T>(rows, g.rows, dim, columns, read, [&](const T* const* x, int64_t d, int64_t length) {
    if (g.need_dx) {
      T last[kRows][kSlab];
      T* dx[kRows];
      const bool tail = d + length > dim;
      for (int r = 0; r < g.rows; ++r) dx[r] = tail ? last[r] : static_cast<T*>(g.dx[r]) + d;
      const float* at = w.packed + d * columns;
      int r = dx_rows<T, 4>(0, g, x, dx, length, at, columns);
      dx_rows<T, 1>(r, g, x, dx, length, at, columns);
      for (r = 0; r < g.rows && tail; ++r) {
        memcpy(static_cast<void*>(static_cast<T*>(g.dx[r]) + d), last[r], size_t(dim - d) * sizeof(T));
      }
    }
    if (g.partial != nullptr) {
      for (int64_t t = 0, first = 0; t < tiles; ++t) {
        const int64_t count = size + (t < wider);
        dw_of<T>(count, x, g.rows, length, columns, g.coefficient + first, g.partial + d * columns + first * W);
        first += count;
      }
    }
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
  const int64_t each = padded(s.dim) * s.columns;
  for (int64_t d = slab_begin * kSlab; d < slab_end * kSlab && d < s.dim; d += W) {
    F gain = zero();
    for (int64_t j = 0; j < s.columns; ++j) {
      const float* at = f.partials + d * s.columns + j * W;
      F total = load(at);
      for (int64_t chunk = 1; chunk < f.chunks; ++chunk) total = add(total, load(at + chunk * each));
      if (f.norm != nullptr) gain = fma(total, folded<T>(bare, j, d), gain);
      if (f.weight == nullptr) continue;
      const F unfolded = s.norm == nullptr ? total : mul(total, load(s.norm + d));
      store_part(static_cast<T*>(f.weight) + j * s.dim + d, unfolded, s.dim - d);
    }
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
                      evaluate,                                             \
                      aggregate,                                            \
                      differentiate,                                        \
                      words}

}  // namespace prudent
