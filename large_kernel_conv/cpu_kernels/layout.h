// Between tensors and lanes: a pixel becomes `blocks` vectors, channel c + i in lane i, and back.
#pragma once

#include "kernels.h"
#include "simd.h"

// Reads `pixels` pixels from `first` on, in row-major order, of one image, channels from `channel` on, to
// out[pixel][blocks * LANES]. Lanes beyond the last channel become zero.
void gather(const Images&, long image, long channel, long first, long pixels, int blocks, float* out);

// Writes what gather reads. Adds `bias` (of these channels, or null) and applies ReLU if asked.
void scatter(const Images&, long image, long channel, long first, long pixels, int blocks, const float* in, const float* bias,
             bool relu);

// The part of the weight (C, 1, K, K) that can reach the map, as out[kernel_height * kernel_width][blocks * LANES], and back.
void gather_kernel(const Plan&, const Images& weight, long channel, int blocks, float* out);
void scatter_kernel(const Plan&, const Images& weight, long channel, int blocks, const float* in);
