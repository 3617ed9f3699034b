// All kernels of one instruction set.
#pragma once

#include "columns.h"
#include "isa.h"
#include "lookup.h"
#include "nearest.h"
#include "stages.h"

namespace vptq {

struct Kernels {
  NearestKernel nearest;
  StagesKernel stages;
  ColumnsKernel columns;
  LookupKernel lookup;
};

const Kernels& kernels_for(Isa isa);

}  // namespace vptq
