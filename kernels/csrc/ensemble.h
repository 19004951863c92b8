// The two directions of ensemble_reward, which ensemble_reward.cpp registers.
#pragma once

#include <tuple>

#include "call.h"

namespace prudent {

// reward, mean, std, reward_sum, distance, saved
std::tuple<Tensor, Tensor, Tensor, Tensor, MaybeTensor, Tensor> ensemble_forward(const Arguments& a, bool keep);

struct Gradients {
  MaybeTensor reward, mean, std, sum, distance;
};
struct Needs {
  bool hidden, weight, bias, norm_weight;
};

// of hidden, weight, bias, norm_weight
std::tuple<MaybeTensor, MaybeTensor, MaybeTensor, MaybeTensor> ensemble_backward(
    const Arguments& a, const Gradients& grads, const Tensor& saved, const Needs& needs);

inline float* data(Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

}  // namespace prudent
