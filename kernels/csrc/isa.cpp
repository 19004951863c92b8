#include "isa.h"

namespace prudent {

const Isa* isa_at(int64_t index) {
#ifdef PRUDENT_X86
  // every AVX2 machine has F16C; __builtin_cpu_supports knows that name only in new compilers
  static const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  static const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  static const bool avx512_bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  if (index == 1) return avx2 ? &kAvx2 : nullptr;
  if (index == 2) return avx512 ? &kAvx512 : nullptr;
  if (index == 3) return avx512_bf16 ? &kAvx512Bf16 : nullptr;
#endif
  return index == 0 ? &kGeneric : nullptr;
}

}  // namespace prudent
