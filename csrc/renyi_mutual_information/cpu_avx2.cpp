#define ISA avx2
#include "renyi_mutual_information/cpu_blocks.inl"
