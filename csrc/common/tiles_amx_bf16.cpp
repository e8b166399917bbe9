#define ISA amx_bf16
#define VBYTES 64
#define MR 16
#define PAIRS
#define AMX
#include "common/tiles.inl"
