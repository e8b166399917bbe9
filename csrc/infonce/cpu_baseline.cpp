#define ISA baseline
#include "infonce/cpu_tiles.inl"
