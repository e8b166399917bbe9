#define ISA avx512
#define VBYTES 64
#include "ms_deform_attn/cpu_rows.inl"
