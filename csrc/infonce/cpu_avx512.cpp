#define ISA avx512
#include "infonce/cpu_tiles.inl"
