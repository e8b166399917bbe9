#define ISA baseline
#define VBYTES 16
#include "ms_deform_attn/cpu_rows.inl"
