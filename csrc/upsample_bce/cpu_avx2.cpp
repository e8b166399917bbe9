#define ISA avx2
#include "upsample_bce/cpu_rows.inl"
