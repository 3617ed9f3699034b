#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "kernels.h"

#define VPTQ_TARGET "avx2,fma,f16c,avx512f,avx512dq,avx512bw,avx512vl,avx512vnni,avx512vbmi"
#define VPTQ_ISA bytes
#define VPTQ_LANES 16
#include "target_begin.h"
#include "lanes.h"
#include "floats_body.h"
#include "table_body.h"
#include "unpack_body.h"
#include "byte_body.h"
#include "gather_body.h"
#include "shuffle_body.h"

namespace vptq {
namespace bytes {

extern const LookupKernel kLookup;
const LookupKernel kLookup = {bytes_fit, bytes_rows_per_tile, byte_input_bytes, prepare_byte_input, byte_scratch_bytes, prepare_bytes,
                              run_bytes};

}  // namespace bytes
}  // namespace vptq
#undef VPTQ_INLINE
#include "target_end.h"
#endif
