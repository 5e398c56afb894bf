// The two kernels that ops.cpp calls. Free of torch's headers.
#pragma once

#include <atomic>
#include <cstddef>

#include "plan.h"

struct Digest;

enum class Type { float32, bfloat16, float16 };

// A dense (N, C, H, W) tensor in memory, contiguous or channels_last.
struct Images {
    void* data;
    Type type;
    long channels, height, width;
    bool channels_last;
    long element_size() const { return type == Type::float32 ? 4 : 2; }
    size_t bytes_per_channel() const { return height * width * element_size(); }
};

// Each function works on the tasks `begin` ... `end`, so that a caller can share them out among threads.
// Tasks of weight_spectra, 0 ... channel_groups; of fft_forward, 0 ... channel_groups * images * tiles; of
// the others, 0 ... channel_groups * parts of the images. Each part adds up its own weight gradient.

// spectra: Plan::spectra_size floats, one channel group's behind the other.
void weight_spectra(const Plan&, const Images& weight, float* spectra, long begin, long end);

// Those spectra, computed before. `digests` (null: known to be right) are those of the weights that they were
// computed from, one for each channel group; a task whose weights are others sets `stale` and computes its
// own.
struct Spectra {
    const float* values = nullptr;
    const Digest* digests = nullptr;
    std::atomic<bool>* stale = nullptr;
};
Digest group_digest(const Plan&, const Images& weight, long group);

// y = convolution of x, plus bias (may be null), then ReLU if asked.
void fft_forward(const Plan&, const Images& x, const Images& weight, const Spectra&, const float* bias,
                 bool relu, const Images& y, long begin, long end);
void direct_forward(const Plan&, const Images& x, const Images& weight, const float* bias, bool relu,
                    const Images& y, long parts, long begin, long end);

// grad_x (data null: not wanted) and the parts' weight gradients (parts, C, kernel height, kernel width)
// (null: not wanted).
void fft_backward(const Plan&, const Images& grad_y, const Images& x, const Images& weight, const Spectra&,
                  const Images& grad_x, float* grad_weight, long parts, long begin, long end);
void direct_backward(const Plan&, const Images& grad_y, const Images& x, const Images& weight,
                     const Images& grad_x, float* grad_weight, long parts, long begin, long end);
