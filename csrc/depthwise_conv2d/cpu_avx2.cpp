#define ISA avx2
#define VBYTES 32
#include "depthwise_conv2d/cpu_rows.inl"
