#if defined(__x86_64__) && defined(__linux__)
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "kernels.h"

#if defined(VPTQ_EMULATE_AMX)
#define VPTQ_TARGET "avx2,fma,f16c,avx512f,avx512dq,avx512bw,avx512vl,avx512bf16"
#else
#define VPTQ_TARGET "avx2,fma,f16c,avx512f,avx512dq,avx512bw,avx512vl,avx512bf16,amx-tile,amx-bf16"
#endif
#define VPTQ_ISA amx
#define VPTQ_LANES 16
#include "target_begin.h"
#include "lanes.h"
#include "floats_body.h"
#include "table_body.h"
#include "unpack_body.h"
#include "prepared_body.h"
#include "books_body.h"
#include "decode_body.h"
#include "amx_tiles.h"
#include "amx_body.h"

namespace vptq {
namespace amx {

extern const LookupKernel kLookup;
const LookupKernel kLookup = {amx_fits, amx_rows_per_tile, amx_input_bytes, prepare_amx_input, amx_scratch_bytes,
                              prepare_lookup, run_amx};

}  // namespace amx
}  // namespace vptq
#undef VPTQ_INLINE
#include "target_end.h"
#endif
