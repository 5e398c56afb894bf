// What ops.cpp calls. Free of torch's headers.
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

// Each function works on the tasks `begin` ... `end`, so that a caller can share them out among threads:
// weight_spectra on those 0 ... channel_groups, convolve on 0 ... convolve_tasks, convolve_backward on 0 ...
// channel_groups * parts. `parts`, of the images: each adds up a weight gradient of its own.

// spectra: Plan::spectra_size floats, one channel group's behind the other.
void weight_spectra(const Plan&, const Images& weight, float* spectra, long begin, long end);

// Those spectra, computed before; none for Method::direct. `digests` (null: known to be right) are those of
// the weights that they were computed from, one for each channel group; a task whose weights are others sets
// `stale` and computes its own.
struct Spectra {
    const float* values = nullptr;
    const Digest* digests = nullptr;
    std::atomic<bool>* stale = nullptr;
};
Digest group_digest(const Plan&, const Images& weight, long group);

// y = convolution of x, plus bias (may be null), then ReLU if asked. The plan is that of Pass::forward.
void convolve(const Plan&, const Images& x, const Images& weight, const Spectra&, const float* bias,
              bool relu, const Images& y, long parts, long begin, long end);
long convolve_tasks(const Plan&, long parts);

// grad_x (data null: not wanted) and the parts' weight gradients (parts, C, kernel height, kernel width)
// (null: not wanted). The plan is that of Pass::backward.
void convolve_backward(const Plan&, const Images& grad_y, const Images& x, const Images& weight,
                       const Spectra&, const Images& grad_x, float* grad_weight, long parts, long begin,
                       long end);
