#include "nearest.h"

namespace vptq {

namespace generic { extern const NearestKernel kNearest; }
#if defined(__x86_64__)
namespace avx2 { extern const NearestKernel kNearest; }
namespace avx512 { extern const NearestKernel kNearest; }
#endif

const NearestKernel& nearest_kernel(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx512) return avx512::kNearest;
  if (isa == Isa::kAvx2) return avx2::kNearest;
#endif
  (void)isa;
  return generic::kNearest;
}

}  // namespace vptq
