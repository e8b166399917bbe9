#define ISA avx512
#include "upsample_bce/cpu_rows.inl"
