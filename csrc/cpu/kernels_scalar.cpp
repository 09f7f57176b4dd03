// Kernels that run on any processor: the plain truth of the others' arithmetic, and what `PIKV_OPS=scalar` runs.
#define PIKV_WIDTH 1
#define PIKV_NAME "scalar"
#define PIKV_KERNELS scalar_kernels
#include "kernels.inl"
