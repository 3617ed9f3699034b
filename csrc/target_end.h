// Closes target_begin.h.
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef VPTQ_PUSH
#undef VPTQ_PRAGMA
