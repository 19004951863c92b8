#include "vec_generic.h"
// after the vectors
#include "kernels_gradient.h"

namespace prudent {
PRUDENT_ISA(kGeneric, "generic");
}
