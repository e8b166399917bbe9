#define ISA baseline
#include "upsample_bce/cpu_rows.inl"
