// Turn the op's stable tensors into plain pointers; shared by forward and backward.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <memory>
#include <optional>
#include <vector>

#include "isa.h"

namespace prudent {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// The schema's arguments in order, without the backward's gradients and needs.
struct Arguments {
  Tensor hidden, weight;
  MaybeTensor bias, rows, norm_weight, seed, shift, scale, std_ref, group;
  int64_t group_size;
  double norm_eps, std_floor;
  MaybeTensor trust_mean, trust_precision, trust_directions, trust_weights, trust_unit, trust_rms;  // all or none
  int64_t kind;
  double coefficient;
  bool source_is_sample;
  int64_t nominal, nominal_head, centre;
  bool of_batch;
  double price, price_from;  // price < 0: none
  int64_t price_power, isa;
};

// [n] values at a stride, read in place.
template <class T>
struct Strided {
  const T* data = nullptr;
  int64_t stride = 0;
  T operator[](int64_t i) const { return data[i * stride]; }
  explicit operator bool() const { return data != nullptr; }
};

Strided<int64_t> indices(const MaybeTensor& t);
Strided<float> floats(const MaybeTensor& t, int64_t dim);  // along dimension dim, stride 0 if it has none
Type type_of(const Tensor& t);
int64_t size_of(Type type);

void refuse_unless(bool ok, const char* argument);
bool is(const MaybeTensor& t, int64_t length, ScalarType type);  // absent, or [length] of that type

Tensor new_floats(std::vector<int64_t> shape);

// Refuses arguments outside the contract with a short message; contract.py then names the argument.
class Call {
 public:
  explicit Call(const Arguments& a);

  // The weight and its factor, the norm weight, in fp32.
  Weights fold();
  // The folded weight in the order of the loops: for the products, or for dx, which needs fp32.
  void pack(Weights& w, bool for_dx);
  // The trust region's tables, likewise; after `fold`.
  void pack_region(bool for_dx);
  int64_t rank() const { return options.trust == nullptr ? 0 : trust_.rank; }
  int64_t saved_columns() const {
    return columns + 1 + (options.trust == nullptr ? 0 : trust_.rank + 2) + int64_t(options.of_batch);
  }
  const void* row(int64_t stored) const { return features_ + stored * row_bytes_; }
  // values minus their mean over the batch or group, in place. Summed in fp64 in the order of the rows.
  void centre(float* values) const;
  // The number of threads that the call is worth, and the number of blocks of `rows` rows that a thread is worth.
  int64_t threads() const;
  int64_t grain(int64_t rows) const;

  const Arguments& a;
  Options options{};
  Region region{};
  const Isa& isa;
  Type type;
  int64_t num_rows, stored_rows, columns, dim;
  Strided<int64_t> rows;

 private:
  void check_shapes() const;
  void check_values() const;
  void check_region() const;
  void read_region();
  float* zeros(int64_t count);  // owned by this call
  void direction_means();
  const float* vector(const MaybeTensor& t);
  void fill(const Weights& w) const;

  const char* features_ = nullptr;
  int64_t row_bytes_ = 0;
  std::vector<std::vector<float>> copies_;  // of [K] and [2K] vectors that are not contiguous
  std::vector<Tensor> owned_;
  std::vector<std::unique_ptr<float[]>> tables_;
  Trust trust_{};
  float* direction_means_ = nullptr;  // [R]
};

// A thread's working memory for kRows rows, without their features.
struct Scratch {
  explicit Scratch(const Call& call);
  Lanes lanes{};
  Block block{};
  int64_t row[kRows];

 private:
  std::unique_ptr<float[]> memory_;
};

}  // namespace prudent
