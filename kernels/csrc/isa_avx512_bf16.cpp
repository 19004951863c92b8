#include "vec_avx512.h"
// after the vectors
#define PRUDENT_DOTS
#include "kernels_gradient.h"

namespace prudent {
PRUDENT_ISA(kAvx512Bf16, "avx512_bf16");
}
