// Between tensors and lanes: a pixel becomes `blocks` vectors, channel c + i in lane i, and back.
#pragma once

#include "kernels.h"
#include "simd.h"

constexpr int MOST_BLOCKS = 4;

// Where the vectors of some pixels lie: that of the b-th LANES channels of pixel p at p * pixel + b * block floats.
struct Lanes {
    long blocks;  // at most MOST_BLOCKS
    long pixel, block;
};

// Reads `pixels` pixels from `first` on, in row-major order, of one image, channels from `channel` on. Lanes beyond the last
// channel become zero.
void gather(const Images&, long image, long channel, long first, long pixels, Lanes, float* out);

// Writes what gather reads. Adds `bias` (of these channels, or null) and applies ReLU if asked. `far`: asks for the places some
// pixels ahead, in channels_last.
void scatter(const Images&, long image, long channel, long first, long pixels, Lanes, const float* in, const float* bias,
             bool relu, bool far);

// Whether outputs are worth asking for. Those of up to 2 MiB (float32) are in a cache since the last call, which on Zen 5 is near
// enough to cost less than the asking; Intel's cache for all cores is not.
bool outputs_are_far(const Plan&);

// The part of the weight (C, 1, K, K) that can reach the map, as kernel_height * kernel_width pixels, and back.
void gather_kernel(const Plan&, const Images& weight, long channel, Lanes, float* out);
void scatter_kernel(const Plan&, const Images& weight, long channel, Lanes, const float* in);
