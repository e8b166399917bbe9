#define ISA avx512
#define VBYTES 64
#define MR 12
#include "cost_volume/cpu_blocks.inl"
