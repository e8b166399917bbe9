#define ISA avx512
#define VBYTES 64
#include "depthwise_conv2d/cpu_rows.inl"
