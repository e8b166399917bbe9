#define ISA avx512_bf16
#define VBYTES 64
#define MR 12
#define PAIRS
#include "common/tiles.inl"
