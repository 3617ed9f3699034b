#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "kernels.h"

#define VPTQ_TARGET "avx2,fma,f16c"
#define VPTQ_ISA avx2
#define VPTQ_LANES 8
#define VPTQ_TILE 4
#include "target_begin.h"
#include "kernels_body.h"
#include "target_end.h"
#endif
