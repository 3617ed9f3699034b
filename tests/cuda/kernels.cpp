// The kernels of one kind of layer as C++, for every number of tokens, with an entry for each that ctypes can call.
//
// VPTQ_BEFORE and VPTQ_AFTER are the kind's parameters before and after the tokens; tests/cuda_layers.py builds this.
#include "shim.h"

#include "lookup.cuh"
#include "layers.cuh"

#define VPTQ_KERNEL VPTQ_BEFORE, VPTQ_TOKENS, VPTQ_AFTER
#define VPTQ_JOIN(a, b) a##b
#define VPTQ_NAME(a, b) VPTQ_JOIN(a, b)
#define decode VPTQ_NAME(decode_, VPTQ_TOKENS)
#define add_parts VPTQ_NAME(add_parts_, VPTQ_TOKENS)

#define VPTQ_TOKENS 1
#include "kernel.h"
#undef VPTQ_TOKENS
#define VPTQ_TOKENS 2
#include "kernel.h"
#undef VPTQ_TOKENS
#define VPTQ_TOKENS 4
#include "kernel.h"
#undef VPTQ_TOKENS
#define VPTQ_TOKENS 8
#include "kernel.h"
