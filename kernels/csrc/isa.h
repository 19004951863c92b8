// Find out which instruction sets this machine has.
#pragma once

#include "kernels.h"

namespace prudent {

constexpr int kIsas = 4;  // generic, avx2, avx512, avx512_bf16: the order of native.py

// The loops of instruction set `index`; null if the machine or the build lacks it.
const Isa* isa_at(int64_t index);

}  // namespace prudent
