#define ISA baseline
#define VBYTES 16
#define MR 4
#include "cost_volume/cpu_blocks.inl"
