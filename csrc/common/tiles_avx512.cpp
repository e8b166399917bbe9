#define ISA avx512
#define VBYTES 64
#define MR 12
#include "common/tiles.inl"
