#include "vec_avx512.h"
// after the vectors
#include "kernels_gradient.h"

namespace prudent {
PRUDENT_ISA(kAvx512, "avx512");
}
