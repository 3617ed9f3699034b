#include "isa.h"

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace vptq {
namespace {

// The tiles' registers are the kernel's to give, once a process. Compilers' own tests of the processor differ in what they
// know of AMX, hence CPUID.
bool has_amx() {
#if defined(__x86_64__) && defined(__linux__)
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) || (eax & 1u << 5) == 0) return false;  // AVX512_BF16
#if defined(VPTQ_EMULATE_AMX)
  return true;
#else
  constexpr unsigned kTile = 1u << 24, kBFloat16 = 1u << 22;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (edx & (kTile | kBFloat16)) != (kTile | kBFloat16)) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, of Linux 5.16
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#endif
#else
  return false;
#endif
}

bool runs_here(Isa isa) {
  if (isa == Isa::kGeneric) return true;
#if defined(__x86_64__)
  __builtin_cpu_init();
  // Kernels use F16C too, which every processor with AVX2 has and Clang 14 cannot ask for.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (isa == Isa::kAvx2) return avx2;
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  if (isa == Isa::kAvx512) return avx512;
  static const bool amx = has_amx();
  return avx512 && amx;
#else
  return false;
#endif
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAmx: return "amx";
    case Isa::kAvx512: return "avx512";
    case Isa::kAvx2: return "avx2";
    default: return "generic";
  }
}

bool choose_isa(Isa* isa) {
  constexpr Isa kFastestFirst[] = {Isa::kAmx, Isa::kAvx512, Isa::kAvx2, Isa::kGeneric};
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
