// Compile what follows for one instruction set, whatever the command line says: VPTQ_TARGET is a string such as
// "avx2,fma". Include every system header before this one, or the functions in it are compiled for that set too and
// the linker may hand them to a machine that lacks it. For the same reason kernel bodies use no std:: templates.
#if defined(__clang__)
#define VPTQ_PRAGMA(x) _Pragma(#x)
#define VPTQ_PUSH(set) VPTQ_PRAGMA(clang attribute push(__attribute__((target(set))), apply_to = function))
VPTQ_PUSH(VPTQ_TARGET)
#else
#define VPTQ_PRAGMA(x) _Pragma(#x)
#define VPTQ_PUSH(set) VPTQ_PRAGMA(GCC target(set))
#pragma GCC push_options
VPTQ_PUSH(VPTQ_TARGET)
#endif
