#include "kernels.h"

namespace vptq {

namespace generic { extern const Kernels kKernels; }
#if defined(__x86_64__) && defined(__linux__)
namespace amx { extern const LookupKernel kLookup; }
#endif
#if defined(__x86_64__)
namespace avx2 { extern const Kernels kKernels; }
namespace avx512 { extern const Kernels kKernels; }
namespace bytes { extern const LookupKernel kLookup; }
namespace products { extern const ProductKernel kProducts; }
#endif

const Kernels& kernels_for(Isa isa) {
#if defined(__x86_64__)
  if (isa >= Isa::kAvx512) return avx512::kKernels;
  if (isa == Isa::kAvx2) return avx2::kKernels;
#endif
  (void)isa;
  return generic::kKernels;
}

const LookupKernel* byte_kernel_for(Isa isa) {
#if defined(__x86_64__)
  const bool there = __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi");
  if (isa >= Isa::kAvx512 && there) return &bytes::kLookup;
#endif
  (void)isa;
  return nullptr;
}

const ProductKernel* product_kernel_for(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx512 && __builtin_cpu_supports("avx512bf16")) return &products::kProducts;
#endif
  (void)isa;
  return nullptr;
}

const LookupKernel* amx_kernel_for(Isa isa) {
#if defined(__x86_64__) && defined(__linux__)
  if (isa == Isa::kAmx) return &amx::kLookup;
#endif
  (void)isa;
  return nullptr;
}

}  // namespace vptq
