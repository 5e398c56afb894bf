// What ops.cpp calls: the two kernels, the choice between them, and scratch memory. Free of torch's headers.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <memory>

struct Digest;
struct Transform;

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

// How one axis of a map is cut: outputs begin ... end of a tile need the inputs from - to.
struct Span {
    long begin, end, from, to;
};

// How a depthwise convolution is computed. `kernel_*`: the part of the K x K kernel that can reach the map.
struct Plan {
    long images, channels, height, width, kernel, kernel_height, kernel_width;
    const Transform *rows, *columns;  // transforms over a row and over a column; null for the direct kernel
    long tile_height, tile_width;     // outputs of one transform
    long tiles_down, tiles_across;    // of one image
    long channel_groups() const;      // of the channels computed at once: LANES, or two times LANES by Fourier transforms
    long tiles() const { return tiles_down * tiles_across; }
    size_t spectrum_size() const;  // floats of one channel group's weight spectrum
};

// The faster way to convolve maps with K x K kernels, by a count of vector instructions.
Plan make_plan(long images, long channels, long height, long width, long kernel);

// Each works on the tasks `begin` ... `end`, so that a caller can share them out among threads.
// Tasks of weight_spectra, 0 ... channel_groups; of fft_forward, 0 ... channel_groups * images * tiles; of the others,
// 0 ... channel_groups * parts of the images. Each part adds up its own weight gradient.

// spectra: channel_groups * spectrum_size floats.
void weight_spectra(const Plan&, const Images& weight, float* spectra, long begin, long end);

// Spectra computed before. `digests` (null: known to be right) are those of the weights that they were computed from, one for each
// channel group; a task whose weights are others sets `stale` and computes its own.
struct Spectra {
    const float* spectra;
    const Digest* digests;
    std::atomic<bool>* stale;
};
Digest group_digest(const Plan&, const Images& weight, long group);

// y = convolution of x, plus bias (may be null), then ReLU if asked.
void fft_forward(const Plan&, const Images& x, const Images& weight, const Spectra&, const float* bias, bool relu, const Images& y,
                 long begin, long end);
void direct_forward(const Plan&, const Images& x, const Images& weight, const float* bias, bool relu, const Images& y, long parts,
                    long begin, long end);

// grad_x (data null: not wanted) and the parts' weight gradients (parts, C, K, K) (null: not wanted).
void fft_backward(const Plan&, const Images& grad_y, const Images& x, const Images& weight, const Spectra&, const Images& grad_x,
                  float* grad_weight, long parts, long begin, long end);
void direct_backward(const Plan&, const Images& grad_y, const Images& x, const Images& weight, const Images& grad_x,
                     float* grad_weight, long parts, long begin, long end);

// `floats` of memory that large transforms read fast, to be given back with free(); throws std::bad_alloc.
float* allocate(size_t floats);
size_t allocated_bytes(size_t floats);  // of memory that it takes
void advise_large_pages(void* memory, size_t bytes);  // for those that were not touched yet
struct Free {
    void operator()(float* p) const { std::free(p); }
};
using Floats = std::unique_ptr<float, Free>;

// Memory that stays for the next use, since mapping pages afresh can take longer than computing.
class Scratch {
  public:
    float* get(size_t floats);  // valid until the next call

  private:
    Floats memory;
    size_t size = 0;
};

// This thread's memory for intermediate results: `floats` of it, valid until the next call.
float* scratch_memory(size_t floats);
