// Fourier transforms of short sequences, one sequence in each lane.
#pragma once

#include <cstddef>

#include "simd.h"

// Memory that will be used next: runs of `bytes`, `stride` bytes apart. A transform asks for it step by step, so that it arrives
// while the CPU computes. Asked for at once it would be waited for, since only few requests can be under way at a time.
struct Ahead {
    const char* place;
    long stride, bytes;
    long runs, each;  // `each`: runs in a step
    bool written;     // or else read

    INLINE void step() {
        const long now = runs < each ? runs : each;
        runs -= now;
        if (written) ask<true>(now);
        else ask<false>(now);
    }

  private:
    template <bool WRITTEN>
    INLINE void ask(long now) {
        if (bytes <= 2 * CACHE_LINE) {  // a group's pixel: worth a loop without an inner one
            for (; now > 0; now--, place += stride)
                __builtin_prefetch(place, WRITTEN), __builtin_prefetch(place + bytes - 1, WRITTEN);
        } else {
            for (; now > 0; now--, place += stride)
                for (long i = 0; i < bytes; i += CACHE_LINE) __builtin_prefetch(place + i, WRITTEN);
        }
    }
};

// A transform of `size` points, an even number. Sequences lie in memory as Complex every `stride` floats. Elements from `count` on
// are zero and not read, or not wanted and not written. Nothing is scaled: inverse(forward(x)) is size * x. `scratch` holds
// size * PAIR floats.
struct Transform {
    int size;
    int cost;   // vector instructions, roughly
    int steps;  // that forward_real and inverse_real take in an Ahead (or null)

    // Coefficients lie side by side, in the order in which the transform leaves them.
    virtual void forward(const float* in, long stride, int count, float* coefficients, float* scratch) const = 0;
    virtual void inverse(const float* coefficients, float* out, long stride, int count, float* scratch) const = 0;

    // In place: forward, times `factors` in the order of the coefficients, and inverse; the first `wanted` elements are written.
    virtual void convolve(float* column, long stride, int count, int wanted, const float* factors, float* scratch) const = 0;

    // Of two real sequences, as real and imaginary parts. Their spectra are `size` Complex side by side: first the frequencies 0 and
    // size / 2, REAL of them, again as real and imaginary parts; then the frequencies 1 ... size / 2 - 1, doubled, of the first
    // sequence, and of the second. The inverse takes them so too, and writes the elements `first` ... `count`.
    virtual void forward_real(const float* in, long stride, int count, float* spectra, float* scratch, Ahead*) const = 0;
    virtual void inverse_real(const float* spectra, float* out, long stride, int first, int count, float* scratch,
                              Ahead*) const = 0;
};
constexpr long REAL = 2;

// The transforms there are, by size; `number` receives how many.
const Transform* const* transforms(int& number);
