#define ISA baseline
#include "infonce/cpu_blocks.inl"
