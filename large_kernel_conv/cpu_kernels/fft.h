// Fourier transforms of short complex sequences, one sequence in each lane.
#pragma once

#include <cstddef>

#include "simd.h"

// A transform of `size` points. Sequences lie in memory as Complex every `stride` floats. Coefficients are kept in the order in
// which the transform leaves them: coefficient k at position[k]. Nothing is scaled: inverse(forward(x)) is size * x.
struct Transform {
    int size;
    int cost;             // vector instructions, roughly
    const int* position;  // position[k]: where coefficient k lies
    const int* mirror;    // mirror[q]: where coefficient -k lies, if k lies at q

    // Elements from `count` on are zero, and not read. `scratch` holds size * PAIR floats.
    virtual void forward(const float* in, long in_stride, int count, float* out, long out_stride, float* scratch) const = 0;

    // Only the first `count` elements are written.
    virtual void inverse(const float* in, long in_stride, float* out, long out_stride, int count, float* scratch) const = 0;

    // The convolution of two columns of a map of blocks (blocks.h), those of the frequencies kx and -kx, in place: forward, times
    // `factors` (of kx, [position][A, B]), inverse. Elements from `count` on are zero, and not read; the first `wanted` are
    // written. Each scratch holds size * PAIR floats. Returns false, and does nothing, where the three steps are faster.
    virtual bool convolve(float* column, float* mirrored, long stride, int count, int wanted, const float* factors,
                          float* const scratch[2]) const = 0;
};

// The transforms there are, by size; `number` receives how many.
const Transform* const* transforms(int& number);
