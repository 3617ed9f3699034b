#include "isa.h"

#include <cstdlib>
#include <cstring>

namespace vptq {
namespace {

bool runs_here(Isa isa) {
  if (isa == Isa::kGeneric) return true;
#if defined(__x86_64__)
  __builtin_cpu_init();
  // Kernels use F16C too, which every processor with AVX2 has and Clang 14 cannot ask for.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (isa == Isa::kAvx2) return avx2;
  return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAvx512: return "avx512";
    case Isa::kAvx2: return "avx2";
    default: return "generic";
  }
}

bool choose_isa(Isa* isa) {
  constexpr Isa kFastestFirst[] = {Isa::kAvx512, Isa::kAvx2, Isa::kGeneric};
  const char* forced = std::getenv("VPTQ_CPU_ISA");
  const bool any = forced == nullptr || forced[0] == '\0';
  for (Isa candidate : kFastestFirst) {
    if (runs_here(candidate) && (any || std::strcmp(forced, isa_name(candidate)) == 0)) {
      *isa = candidate;
      return true;
    }
  }
  return false;
}

}  // namespace vptq
