// Correlations of one block of channels, as they are written down.
#pragma once

#include "simd.h"

// A call keeps at most ROWS rows of outputs in registers.
constexpr int ROWS = LANES == 8 ? 2 : 3;

// Pixels or taps of one block of channels, a vector each: floats from row to row, and from one to the next.
struct Rows {
    float* first;
    long height, width, row, pixel;
    float* at(long i, long j) const { return first + i * row + j * pixel; }
};

// A bias, and ReLU if asked: what scatter does where outputs are not written in place.
struct Finish {
    Vec bias;
    bool relu;
    Vec operator()(Vec v) const { return relu ? at_least(v + bias, Vec{}) : v + bias; }
};

// Without dilation. Patches of more than two rows of outputs need ROWS - 1 rows of zeros before the kernel's
// first row and after its last one, as far apart as its own.
struct Correlation {
    Rows in, kernel;
    long padding_top, padding_left;
    Rows out;
    bool zero_rows;
    const Finish* finish = nullptr;  // of each output, or none
};

// out (i, j) = sum over p, q of kernel (p, q) times in (i + p - padding_top, j + q - padding_left), which is
// zero where there is none.
void correlate(const Correlation&);
