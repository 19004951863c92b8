// prudent_native::ensemble_reward_forward and _backward, and the library's other small ops: their registration through
// LibTorch's stable ABI.
#include <algorithm>
#include <numeric>
#include <tuple>

#include "ensemble.h"

namespace prudent {

#define PRUDENT_PARAMETERS                                                                                          \
  Tensor hidden, Tensor weight, MaybeTensor bias, MaybeTensor rows, MaybeTensor norm_weight, MaybeTensor seed,      \
      MaybeTensor shift, MaybeTensor scale, MaybeTensor std_ref, MaybeTensor group, int64_t group_size,             \
      double norm_eps, double std_floor, MaybeTensor trust_mean, MaybeTensor trust_precision,                       \
      MaybeTensor trust_directions, MaybeTensor trust_weights, MaybeTensor trust_unit, MaybeTensor trust_rms,       \
      int64_t kind, double coefficient, bool source_is_sample, int64_t nominal, int64_t nominal_head,               \
      int64_t centre, bool of_batch, double price, double price_from, int64_t price_power, int64_t isa
#define PRUDENT_ARGUMENTS                                                                                           \
  {hidden,      weight,     bias,        rows,          norm_weight,     seed,             shift,   scale,          \
   std_ref,     group,      group_size,  norm_eps,      std_floor,       trust_mean,       trust_precision,         \
   trust_directions,        trust_weights, trust_unit,  trust_rms,       kind,             coefficient,             \
   source_is_sample,        nominal,     nominal_head,  centre,          of_batch,         price,   price_from,     \
   price_power, isa}

std::tuple<Tensor, Tensor, Tensor, Tensor, MaybeTensor, Tensor> ensemble_reward_forward(PRUDENT_PARAMETERS,
                                                                                        bool keep) {
  return ensemble_forward(PRUDENT_ARGUMENTS, keep);
}

std::tuple<MaybeTensor, MaybeTensor, MaybeTensor, MaybeTensor> ensemble_reward_backward(
    MaybeTensor grad_reward, MaybeTensor grad_mean, MaybeTensor grad_std, MaybeTensor grad_sum,
    MaybeTensor grad_distance, PRUDENT_PARAMETERS, Tensor saved, bool need_hidden, bool need_weight, bool need_bias,
    bool need_norm_weight) {
  return ensemble_backward(PRUDENT_ARGUMENTS, {grad_reward, grad_mean, grad_std, grad_sum, grad_distance}, saved,
                           {need_hidden, need_weight, need_bias, need_norm_weight});
}

int64_t supported_isas() {
  int64_t bits = 0;
  for (int i = 0; i < kIsas; ++i) bits |= int64_t(isa_at(i) != nullptr) << i;
  return bits;
}

// Increase it with every change of a schema below or of an argument's meaning; native.py has the same number.
int64_t version() { return 3; }

// For the tests: the noise's words 0 and 1 at counters first .. first + count - 1, [count, 2].
Tensor philox_words(Tensor seed, int64_t first, int64_t count, int64_t isa) {
  Tensor words = torch::stable::empty({count, 2}, ScalarType::Long);
  int64_t* out = static_cast<int64_t*>(words.mutable_data_ptr());
  int64_t counter[kRows];
  uint32_t found[2 * kRows];
  for (int64_t at = 0; at < count; at += kRows) {
    std::iota(counter, counter + kRows, first + at);
    isa_at(isa)->words(indices(seed)[0], counter, found);
    for (int64_t i = 0; i < std::min<int64_t>(kRows, count - at); ++i) {
      out[2 * (at + i)] = found[i];
      out[2 * (at + i) + 1] = found[kRows + i];
    }
  }
  return words;
}

#define PRUDENT_SCHEMA                                                                                                \
  "Tensor hidden, Tensor weight, Tensor? bias, Tensor? rows, Tensor? norm_weight, Tensor? seed, Tensor? shift, "      \
  "Tensor? scale, Tensor? std_ref, Tensor? group, int group_size, float norm_eps, float std_floor, "                  \
  "Tensor? trust_mean, Tensor? trust_precision, Tensor? trust_directions, Tensor? trust_weights, "                    \
  "Tensor? trust_unit, Tensor? trust_rms, int kind, float coefficient, bool source_is_sample, int nominal, "          \
  "int nominal_head, int centre, bool of_batch, float price, float price_from, int price_power, int isa"

STABLE_TORCH_LIBRARY(prudent_native, m) {
  m.def("ensemble_reward_forward(" PRUDENT_SCHEMA ", bool keep) -> (Tensor, Tensor, Tensor, Tensor, Tensor?, Tensor)");
  m.def(
      "ensemble_reward_backward(Tensor? grad_reward, Tensor? grad_mean, Tensor? grad_std, Tensor? grad_sum, "
      "Tensor? grad_distance, " PRUDENT_SCHEMA
      ", Tensor saved, bool need_hidden, bool need_weight, bool need_bias, bool need_norm_weight) "
      "-> (Tensor?, Tensor?, Tensor?, Tensor?)");
  m.def("philox_words(Tensor seed, int first, int count, int isa) -> Tensor");
  m.def("version() -> int");
  m.def("supported_isas() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(prudent_native, CPU, m) {
  m.impl("ensemble_reward_forward", TORCH_BOX(&ensemble_reward_forward));
  m.impl("ensemble_reward_backward", TORCH_BOX(&ensemble_reward_backward));
  m.impl("philox_words", TORCH_BOX(&philox_words));
}

STABLE_TORCH_LIBRARY_IMPL(prudent_native, CompositeExplicitAutograd, m) {
  m.impl("supported_isas", TORCH_BOX(&supported_isas));
  m.impl("version", TORCH_BOX(&version));
}

}  // namespace prudent
