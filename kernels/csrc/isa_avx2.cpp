#include "vec_avx2.h"
// after the vectors
#include "kernels_gradient.h"

namespace prudent {
PRUDENT_ISA(kAvx2, "avx2");
}
