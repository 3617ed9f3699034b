#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <limits>

#include "kernels.h"

#define VPTQ_TARGET "avx2,fma,f16c,avx512f,avx512dq,avx512bw,avx512vl,avx512bf16"
#define VPTQ_ISA products
#define VPTQ_LANES 16
#include "target_begin.h"
#include "lanes.h"
#include "products_body.h"

namespace vptq {
namespace products {

extern const ProductKernel kProducts;
const ProductKernel kProducts = {products_packed_floats, product_panels, pack_products, product_tiles, run_products};

}  // namespace products
}  // namespace vptq
#undef VPTQ_INLINE
#include "target_end.h"
#endif
