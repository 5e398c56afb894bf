// Fourier transforms of short sequences, one sequence in each lane.
#pragma once

#include "ahead.h"
#include "simd.h"

// A transform of `size` points, an even number. Sequences lie in memory as Complex every `stride` floats.
// Elements from `count` on are zero and not read, or not wanted and not written. Nothing is scaled:
// inverse(forward(x)) is size * x. `scratch` holds size * PAIR floats.
struct Transform {
    int size;
    int cost;   // vector instructions, roughly
    int steps;  // of an Ahead (which may be null) in forward_real and in inverse_real

    // Coefficients lie side by side, in the order in which the transform leaves them.
    virtual void forward(const float* in, long stride, int count, float* coefficients,
                         float* scratch) const = 0;
    virtual void inverse(const float* coefficients, float* column, long stride, int count,
                         float* scratch) const = 0;

    // In place: forward, times `factors` in the order of the coefficients, and inverse; the first `wanted`
    // elements are written. It and inverse take sequences for columns of a map, and ask for the next one,
    // PAIR floats further.
    virtual void convolve(float* column, long stride, int count, int wanted, const float* factors,
                          float* scratch) const = 0;

    // Of two real sequences, as real and imaginary parts. Their spectra are `size` Complex side by side:
    // first PACKED of two real numbers, the frequencies 0 and size / 2 of both; then the frequencies 1 ...
    // size / 2 - 1 of the first sequence, and those of the second. forward_real doubles all but the packed
    // ones; inverse_real takes all at one scale, and writes the elements `first` ... `count`.
    virtual void forward_real(const float* in, long stride, int count, float* spectra, float* scratch,
                              Ahead*) const = 0;
    virtual void inverse_real(const float* spectra, float* out, long stride, int first, int count,
                              float* scratch, Ahead*) const = 0;
};
constexpr long PACKED = 2;

// The transforms there are, by size; `number` receives how many.
const Transform* const* transforms(int& number);
