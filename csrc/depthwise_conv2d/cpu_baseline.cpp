#define ISA baseline
#define VBYTES 16
#include "depthwise_conv2d/cpu_rows.inl"
