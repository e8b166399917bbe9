#define ISA avx2
#include "infonce/cpu_tiles.inl"
