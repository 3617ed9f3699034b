// All kernels of one instruction set.
#pragma once

#include "columns.h"
#include "isa.h"
#include "lookup.h"
#include "nearest.h"
#include "products.h"
#include "stages.h"

namespace vptq {

struct Kernels {
  NearestKernel nearest;
  StagesKernel stages;
  ColumnsKernel columns;
  LookupKernel lookup;
  FloatKernel floats;
};

const Kernels& kernels_for(Isa isa);

// One token with codebooks rounded to bytes; null where the machine lacks the instructions, or `isa` forbids them.
const LookupKernel* byte_kernel_for(Isa isa);

// Products of bfloat16; null likewise, and where the tiles of AMX are: outside of them such processors multiply bfloat16 at the
// speed of float32.
const ProductKernel* product_kernel_for(Isa isa);

// Several tokens in tiles of bfloat16; null likewise.
const LookupKernel* amx_kernel_for(Isa isa);

}  // namespace vptq
