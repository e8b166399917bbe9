#define ISA baseline
#include "renyi_mutual_information/cpu_blocks.inl"
