#define ISA baseline
#define VBYTES 16
#define MR 4
#include "common/tiles.inl"
