#define ISA avx2
#define VBYTES 32
#include "ms_deform_attn/cpu_rows.inl"
