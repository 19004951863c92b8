// Fold the weight and multiply rows with it, in vectors of the instruction set whose vec_*.h was included before.
// A row's bits depend only on its own features: not on its neighbours, its block or its thread.
#pragma once

#include "kernels_trust.h"

namespace prudent {
namespace {

template <class T>
inline F load_part(const T* p, int64_t stride, int64_t count) {
  if (stride == 1 && count >= W) return load(p);
  T part[W] = {};
  for (int64_t i = 0; i < count && i < W; ++i) part[i] = p[i * stride];
  return load(part);
}

template <class T>
inline F folded(const Source& s, int64_t column, int64_t d) {
  const T* row = static_cast<const T*>(s.data) + column * s.row_stride;
  const F w = load_part(row + d * s.col_stride, s.col_stride, s.dim - d);
  return s.norm == nullptr ? w : mul(w, load(s.norm + d));
}

template <class T>
void pack_floats(const Weights& w, int64_t begin, int64_t end) {
  const int64_t columns = w.source.columns;
  for (int64_t d = begin; d < end; d += W) {
    float* out = w.packed + d * columns;
    for (int64_t j = 0; j < columns; ++j) {
      const bool inside = d < w.source.dim;
      store(out + j * W, inside ? folded<T>(w.source, j, d) : zero());
    }
  }
}

#ifdef PRUDENT_DOTS
void pack_dots(const Weights& w, int64_t begin, int64_t end) {
  const int64_t columns = w.source.columns;
  for (int64_t d = begin; d < end; d += kSlab) {
    for (int64_t j = 0; j < columns; ++j) {
      BFloat* out = w.dots + d * columns + j * kSlab;
      for (int64_t i = 0; i < kSlab; i += W) {
        store(out + i, d + i < w.source.dim ? folded<BFloat>(w.source, j, d + i) : zero());
      }
    }
  }
}
#endif

void pack(const Weights& w, int64_t slab_begin, int64_t slab_end) {
  const int64_t begin = slab_begin * kSlab, end = slab_end * kSlab;
  if (w.packed != nullptr) {
    if (w.source.type == kFloat32) pack_floats<float>(w, begin, end);
    if (w.source.type == kFloat16) pack_floats<Half>(w, begin, end);
    if (w.source.type == kBFloat16) pack_floats<BFloat>(w, begin, end);
  }
#ifdef PRUDENT_DOTS
  if (w.dots != nullptr) pack_dots(w, begin, end);
#endif
}

// Calls body(x, first, length) over stretches of features whose weights stay in the first-level cache; the last,
// partial slab is copied and padded with zeros, so that no loop below needs a tail. Without `read`, x is not read.
template <class T, class Body>
inline void for_stretches(const void* const* x, int rows, int64_t dim, int64_t columns, bool read,
                          const Body& body) {
  constexpr int64_t kWeightBytes = 20 << 10;
  int64_t stretch = kWeightBytes / (4 * columns) / kSlab * kSlab;
  stretch = stretch < 2 * kSlab ? 2 * kSlab : stretch > kMaxStretch ? kMaxStretch : stretch;
  const int64_t whole = dim / kSlab * kSlab;
  const T* at[kRows];
  for (int64_t d = 0; d < whole; d += stretch) {
    for (int r = 0; r < rows; ++r) at[r] = static_cast<const T*>(x[r]) + d;
    body(at, d, whole - d < stretch ? whole - d : stretch);
  }
  if (whole < dim) {
    T last[kRows][kSlab];
    memset(static_cast<void*>(last), 0, sizeof last);
    for (int r = 0; r < rows; ++r) {
      at[r] = last[r];
      if (!read) continue;
      memcpy(static_cast<void*>(last[r]), static_cast<const T*>(x[r]) + whole, size_t(dim - whole) * sizeof(T));
    }
    body(at, whole, kSlab);
  }
}

template <class T>
struct Multiply {  // fp32 multiply-adds
  using Element = T;
  using Weight = float;
  using Vector = F;
  static constexpr int64_t kStep = W;
  static constexpr int64_t kEach = W;
  static const Weight* weights(const Weights& w) { return w.packed; }
  static Vector read(const T* p) { return load(p); }
  static F times(Vector x, const Weight* w, F a) { return fma(x, load(w), a); }
  static F square(Vector x, F a) { return fma(x, x, a); }
};

#ifdef PRUDENT_DOTS
// vdpbf16ps: two bf16 products a lane. Only for a bf16 weight: a weight of more bits would be split into hi + lo, two
// dots instead of two fp32 multiply-adds: as much work for 16 of fp32's 24 bits. Subnormals count as zeros, which makes
// no difference without a norm.
struct Dot {
  using Element = BFloat;
  using Weight = BFloat;
  using Vector = __m512bh;
  static constexpr int64_t kStep = kSlab;
  static constexpr int64_t kEach = kSlab;
  static const Weight* weights(const Weights& w) { return w.dots; }
  static Vector read(const BFloat* p) { return (Vector)_mm512_loadu_si512(p); }
  static F times(Vector x, const Weight* w, F a) { return _mm512_dpbf16_ps(a, x, read(w)); }
  static F square(Vector x, F a) { return _mm512_dpbf16_ps(a, x, x); }
};
#endif

// Prefetch a row's next kilobyte, or the whole next block if both fit the second-level cache.
constexpr int64_t kAheadBytes = 1024, kBlockBytes = 256 << 10;

// sums: [R][row], of which the first columns + 1 vectors are the square and the products; undefined before if `fresh`.
// ahead: features to prefetch, or null.
template <class P, int R, int C, bool kSquare>
inline void tile(const typename P::Element* const* x, const typename P::Element* const* ahead, int64_t length,
                 const typename P::Weight* w, int64_t columns, float* sums, int64_t row, bool fresh, int64_t first) {
  const bool fetch = ahead != nullptr;
  const typename P::Element *at[R], *soon[R];
  F total[R][C], squares[R];
  for (int r = 0; r < R; ++r) {
    at[r] = x[r];
    soon[r] = fetch ? ahead[r] : nullptr;
    squares[r] = kSquare && !fresh ? load(sums + r * row) : zero();
    for (int c = 0; c < C; ++c) total[r][c] = fresh ? zero() : load(sums + r * row + (1 + first + c) * W);
  }
  w += first * P::kEach;
  for (int64_t d = 0; d < length; d += P::kStep, w += columns * P::kEach) {
    typename P::Vector v[R];
    for (int r = 0; r < R; ++r) {
      v[r] = P::read(at[r] + d);
      if (fetch) __builtin_prefetch(soon[r] + d, 0, 2);
    }
    for (int r = 0; r < R && kSquare; ++r) squares[r] = P::square(v[r], squares[r]);
    for (int c = 0; c < C; ++c) {
      for (int r = 0; r < R; ++r) total[r][c] = P::times(v[r], w + c * P::kEach, total[r][c]);
    }
  }
  for (int r = 0; r < R; ++r) {
    if (kSquare) store(sums + r * row, squares[r]);
    for (int c = 0; c < C; ++c) store(sums + r * row + (1 + first + c) * W, total[r][c]);
  }
}

template <class P, int R, bool kSquare, class... Args>
inline void tile_of(int64_t c, Args... args) {
  static_assert(kTileColumns == 5 || kTileColumns == 6, "the cases below");
  switch (c) {
    case 1: return tile<P, R, 1, kSquare>(args...);
    case 2: return tile<P, R, 2, kSquare>(args...);
    case 3: return tile<P, R, 3, kSquare>(args...);
    case 4: return tile<P, R, 4, kSquare>(args...);
    case 5: return tile<P, R, 5, kSquare>(args...);
    default: return tile<P, R, kTileColumns, kSquare>(args...);
  }
}

// Features to prefetch while others are multiplied, each once: in the first of the passes over the columns, or spread
// over several, because a pass that asks for all of them waits for memory.
template <class T>
struct Ahead {
  const T* const* rows;  // null: none
  int passes;
  int pass;  // of the first tile of columns
};

template <class P, int R>
inline int rows_of(int r, int rows, const typename P::Element* const* x, Ahead<typename P::Element> ahead,
                   int64_t length, const typename P::Weight* w, int64_t columns, float* sums, int64_t row, bool fresh,
                   int64_t first, int64_t count, bool square) {
  for (; r + R <= rows; r += R) {
    float* out = sums + r * row;
    const bool now = ahead.rows != nullptr && r * ahead.passes / kRows == ahead.pass;
    const typename P::Element* const* soon = now ? ahead.rows + r : nullptr;
    if (square) {
      tile_of<P, R, true>(count, x + r, soon, length, w, columns, out, row, fresh, first);
    } else {
      tile_of<P, R, false>(count, x + r, soon, length, w, columns, out, row, fresh, first);
    }
  }
  return r;
}

inline int column_tiles(int64_t columns) { return int((columns + kTileColumns - 1) / kTileColumns); }

// Adds `length` features' share of the products with every column to sums [rows][row].
template <class P>
inline void stretch_products(const typename P::Element* const* x, Ahead<typename P::Element> ahead, int rows,
                             int64_t length, const typename P::Weight* w, int64_t columns, float* sums, int64_t row,
                             bool fresh, bool squares) {
  const int64_t tiles = column_tiles(columns), size = columns / tiles, wider = columns % tiles;
  for (int64_t t = 0, first = 0; t < tiles; ++t, ++ahead.pass) {
    const int64_t count = size + (t < wider);
    const bool square = t == 0 && squares;
    int r = rows_of<P, kTileRows>(0, rows, x, ahead, length, w, columns, sums, row, fresh, first, count, square);
    r = rows_of<P, 2>(r, rows, x, ahead, length, w, columns, sums, row, fresh, first, count, square);
    rows_of<P, 1>(r, rows, x, ahead, length, w, columns, sums, row, fresh, first, count, square);
    first += count;
  }
}

// The same for the trust region: sums [rows][row] are sum precision t^2, sum precision mean t, direction products.
template <class T>
inline void stretch_region(const Region& g, const T* const* x, int64_t d, int rows, int64_t length, float* kept,
                           float* sums, int64_t row) {
  const int64_t rank = g.directions.source.columns;
  float* gaps[kRows];
  for (int r = 0; r < kRows; ++r) gaps[r] = kept + r * length;
  gap_sums(g, d, length, x, gaps, rows, rank > 0, d == 0, sums, row);
  if (rank == 0) return;
  const float* w = g.directions.packed + d * rank;
  stretch_products<Multiply<float>>(gaps, {}, rows, length, w, rank, sums + W, row, d == 0, false);
}

// Lane r of column c: the sum of the vector at sums + r * row + c * W.
inline void store_columns(const float* sums, int64_t row, int rows, int64_t columns, float* out) {
  for (int first = 0; first < rows; first += W) {
    for (int64_t c = 0; c < columns; ++c) store(out + c * kRows + first, sums_of(sums + first * row + c * W, row));
  }
}

template <class P>
void products(const Weights& w, const Block& b) {
  const int64_t columns = w.source.columns, row = (columns + 1) * W;
  const int64_t rank = b.region == nullptr ? 0 : b.region->directions.source.columns, region_row = (rank + 2) * W;
  const int64_t bytes = b.rows * w.source.dim * int64_t(sizeof(typename P::Element));
  const bool whole = b.next[0] != nullptr && bytes <= kBlockBytes;
  const int tiles = column_tiles(columns), groups = kRows / kTileRows;
  const int passes = b.region == nullptr ? 1 : tiles < groups ? tiles : groups;
  float *sums = b.scratch, *region_sums = sums + scratch_floats(columns), *kept = region_sums + kRows * region_row;
  for_stretches<typename P::Element>(
      b.x, b.rows, w.source.dim, b.region == nullptr ? columns : kTileColumns, true,
      [&](const typename P::Element* const* x, int64_t d, int64_t length) {
        const typename P::Element* ahead[kRows];
        for (int r = 0; r < b.rows; ++r) {
          ahead[r] = whole ? static_cast<const typename P::Element*>(b.next[r]) + d
                           : x[r] + kAheadBytes / int64_t(sizeof(typename P::Element));
        }
        const typename P::Weight* at = P::weights(w) + d / P::kStep * columns * P::kEach;
        const bool square = b.square != nullptr;
        stretch_products<P>(x, {ahead, passes, 0}, b.rows, length, at, columns, sums, row, d == 0, square);
        if (b.region == nullptr) return;
        stretch_region(*b.region, x, d, b.rows, length, kept, region_sums, region_row);
      });
  if (b.region != nullptr) store_columns(region_sums, region_row, b.rows, rank + 2, b.gaps);
  for (int first = 0; first < b.rows; first += W) {
    const float* at = sums + first * row;
    if (b.square != nullptr) store(b.square + first, sums_of(at, row));
    for (int64_t c = 0; c < columns; ++c) {
      const F product = sums_of(at + (1 + c) * W, row);
      if (b.by_column) {
        store(b.product + c * kRows + first, product);
      } else {
        float lanes[W];
        store(lanes, product);
        for (int r = first; r < b.rows && r < first + W; ++r) b.product[r * columns + c] = lanes[r - first];
      }
    }
  }
}

#ifdef PRUDENT_DOTS
void bfloat_products(const Weights& w, const Block& b) {
  w.dots != nullptr ? products<Dot>(w, b) : products<Multiply<BFloat>>(w, b);
}
#else
constexpr auto bfloat_products = products<Multiply<BFloat>>;
#endif

}  // namespace
}  // namespace prudent
