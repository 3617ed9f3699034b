#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "kernels.h"

#define VPTQ_TARGET "avx2,fma,f16c,avx512f,avx512dq,avx512bw,avx512vl"
#define VPTQ_ISA avx512
#define VPTQ_LANES 16
#define VPTQ_TILE 6
#include "target_begin.h"
#include "kernels_body.h"
#include "target_end.h"
#endif
