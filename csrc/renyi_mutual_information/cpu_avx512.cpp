#define ISA avx512
#include "renyi_mutual_information/cpu_blocks.inl"
