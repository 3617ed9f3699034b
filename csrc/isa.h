// Which instruction set the CPU kernels use: found once a call, so that tests can force each one in turn.
#pragma once

namespace vptq {

// Each has what those before it have. AMX is AVX-512 with tiles of bfloat16.
enum class Isa { kGeneric = 0, kAvx2 = 1, kAvx512 = 2, kAmx = 3 };

const char* isa_name(Isa isa);

// Best instruction set of this machine that was also compiled in, or the one that VPTQ_CPU_ISA names.
// Returns false, and leaves *isa alone, when VPTQ_CPU_ISA names one that is unknown or cannot run here.
bool choose_isa(Isa* isa);

}  // namespace vptq
