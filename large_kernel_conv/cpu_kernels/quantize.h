// Numbers as levels 0 ... 255, for the int8 products between which a convolution stands.
#pragma once

#include <cstdint>

#include "kernels.h"

// levels = x * scale + shift, rounded to the nearest, ties to even; NaN becomes 0. x holds pixels of `channels`
// adjacent numbers, float32 or bfloat16, of which begin ... end are converted; scale and shift have one
// number a channel.
void as_levels(Type, const void* x, const float* scale, const float* shift, uint8_t* levels, long channels,
               long begin, long end);
