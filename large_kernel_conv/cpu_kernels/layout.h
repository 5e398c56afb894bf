// Between tensors and vectors: LANES adjacent channels of a pixel, a block, become a vector, channel c + i in
// lane i, and back.
#pragma once

#include "kernels.h"
#include "simd.h"

constexpr int MOST_BLOCKS = 4;

// Where the vectors of some pixels lie: that of block b of pixel p at p * pixel_stride + b * block_stride
// floats.
struct Blocks {
    long number;  // at most MOST_BLOCKS
    long pixel_stride, block_stride;
};

// Reads `pixels` pixels from `first` on, in row-major order, of one image, channels from `channel` on. Lanes
// beyond the last channel become zero.
void gather(const Images&, long image, long channel, long first, long pixels, Blocks, float* out);

// Writes what gather reads. Adds `bias` (of these channels, or null) and applies ReLU if asked. `far`: asks
// for the places some pixels ahead, in channels_last.
void scatter(const Images&, long image, long channel, long first, long pixels, Blocks, const float* in,
             const float* bias, bool relu, bool far);

// Whether outputs are worth asking for. Those of up to 2 MiB (float32) are in a cache since the last call,
// which on Zen 5 is near enough to cost less than the asking; Intel's cache for all cores is not.
bool outputs_are_far(const Plan&);

// The part of the weight (C, 1, kernel height, kernel width) that can reach the map, as an image of that
// size, and back.
void gather_kernel(const Plan&, const Images& weight, long channel, Blocks, float* out);
void scatter_kernel(const Plan&, const Images& weight, long channel, Blocks, const float* in);

// One of several weight gradients (parts, C, kernel height, kernel width).
Images weight_gradient_of(const Plan&, float* grad_weight, long part);
