#include "layout.h"

#include <algorithm>
#include <limits>

namespace {

template <class T>
INLINE Vec load_some(const T* p, long count) {  // the rest is zero
    if (count >= LANES) return load_as_float(p);
    T padded[LANES] = {};
    std::memcpy(padded, p, count * sizeof(T));
    return load_as_float(padded);
}

template <class T>
INLINE void store_some(T* p, Vec v, long count) {
    if (count >= LANES) return store_from_float(p, v);
    T padded[LANES];
    store_from_float(padded, v);
    std::memcpy(p, padded, count * sizeof(T));
}

template <class T>
T* pixel_address(const Images& t, long image, long channel, long pixel) {
    const long area = t.height * t.width;
    const long place = t.channels_last ? pixel * t.channels + channel : channel * area + pixel;
    return (T*)t.data + image * t.channels * area + place;
}

// Calls visit(first, count) for runs of LANES pixels; a last shorter run starts earlier if there is room.
template <class F>
INLINE void for_pixel_runs(long pixels, F visit) {
    const long count = std::min(pixels, (long)LANES);
    for (long i = 0; i < pixels; i += LANES) visit(std::min(i, pixels - count), count);
}

// How many channels block b has, of those from `channel` on.
INLINE long channels_of_block(const Images& t, long channel, long b) {
    return std::clamp(t.channels - channel - b * LANES, 0L, (long)LANES);
}

// Calls visit(pixel, block, channels of the block): in channels_last all blocks of a pixel before the next
// one, which may lie on another page.
template <class F>
INLINE void for_pixels(const Images& t, long channel, long pixels, long blocks, F visit) {
    if (channel + blocks * LANES <= t.channels) {
        for (long i = 0; i < pixels; i++)
            for (long b = 0; b < blocks; b++) visit(i, b, (long)LANES);
    } else {
        for (long i = 0; i < pixels; i++)
            for (long b = 0; b < blocks; b++) visit(i, b, channels_of_block(t, channel, b));
    }
}

// One block of a contiguous image, whose channels lie `area` apart.
template <class T>
INLINE void gather_planes(const T* source, long area, long pixels, long channels, float* out,
                          long pixel_stride) {
    for_pixel_runs(pixels, [&](long i, long count) {
        Vec rows[LANES];
        if (channels == LANES && count == LANES) {
            UNROLL for (int c = 0; c < LANES; c++) rows[c] = load_as_float(source + c * area + i);
            transpose(rows);
            UNROLL for (int p = 0; p < LANES; p++) store(out + (i + p) * pixel_stride, rows[p]);
        } else {
            for (int c = 0; c < LANES; c++)
                rows[c] = c < channels ? load_some(source + c * area + i, count) : Vec{};
            transpose(rows);
            for (int p = 0; p < count; p++) store(out + (i + p) * pixel_stride, rows[p]);
        }
    });
}

template <class T>
INLINE void scatter_planes(T* target, long area, long pixels, long channels, const float* in,
                           long pixel_stride, Vec offset, Vec floor) {
    for_pixel_runs(pixels, [&](long i, long count) {
        auto value = [&](int p) { return at_least(load(in + (i + p) * pixel_stride) + offset, floor); };
        Vec rows[LANES];
        if (channels == LANES && count == LANES) {
            UNROLL for (int p = 0; p < LANES; p++) rows[p] = value(p);
            transpose(rows);
            UNROLL for (int c = 0; c < LANES; c++) store_from_float(target + c * area + i, rows[c]);
        } else {
            for (int p = 0; p < LANES; p++) rows[p] = p < count ? value(p) : Vec{};
            transpose(rows);
            for (int c = 0; c < channels; c++) store_some(target + c * area + i, rows[c], count);
        }
    });
}

// Pixels in channels_last may lie too far apart for the CPU to foresee them. Those of 1024 channels share one
// place in a first cache, which has room for 8 or 12 of them. Asking for some beyond the last is no access.
constexpr long AHEAD = 8;

template <class T>
void gather_as(const Images& t, long image, long channel, long first, long pixels, Blocks to, float* out) {
    const long area = t.height * t.width, channels = t.channels;
    const T* const source = pixel_address<T>(t, image, channel, first);
    if (t.channels_last) {
        for_pixels(t, channel, pixels, to.number, [&](long i, long b, long count) {
            __builtin_prefetch(source + (i + AHEAD) * channels + b * LANES);
            float* pixel = out + i * to.pixel_stride + b * to.block_stride;
            store(pixel, load_some(source + i * channels + b * LANES, count));
        });
    } else {
        for (long b = 0; b < to.number; b++)
            gather_planes(source + b * LANES * area, area, pixels, channels_of_block(t, channel, b),
                          out + b * to.block_stride, to.pixel_stride);
    }
}

template <class T>
void scatter_as(const Images& t, long image, long channel, long first, long pixels, Blocks from,
                const float* in, const float* bias, bool relu, bool far) {
    const long area = t.height * t.width, channels = t.channels;
    const Vec floor = splat(relu ? 0 : -std::numeric_limits<float>::infinity());
    T* const target = pixel_address<T>(t, image, channel, first);
    Vec offset[MOST_BLOCKS];
    for (long b = 0; b < from.number; b++)
        offset[b] = bias ? load_some(bias + b * LANES, channels_of_block(t, channel, b)) : Vec{};
    if (t.channels_last) {
        for_pixels(t, channel, pixels, from.number, [&](long i, long b, long count) {
            if (far) __builtin_prefetch(target + (i + AHEAD) * channels + b * LANES, 1);
            const float* pixel = in + i * from.pixel_stride + b * from.block_stride;
            store_some(target + i * channels + b * LANES, at_least(load(pixel) + offset[b], floor), count);
        });
    } else {
        for (long b = 0; b < from.number; b++)
            scatter_planes(target + b * LANES * area, area, pixels, channels_of_block(t, channel, b),
                           in + b * from.block_stride, from.pixel_stride, offset[b], floor);
    }
}

}  // namespace

void gather(const Images& t, long image, long channel, long first, long pixels, Blocks to, float* out) {
    auto as = [&]<class T>(T) { gather_as<T>(t, image, channel, first, pixels, to, out); };
    switch (t.type) {
        case Type::float32: return as(float());
        case Type::bfloat16: return as(BFloat16());
        case Type::float16: return as(Float16());
    }
}

void scatter(const Images& t, long image, long channel, long first, long pixels, Blocks from, const float* in,
             const float* bias, bool relu, bool far) {
    auto as = [&]<class T>(T) { scatter_as<T>(t, image, channel, first, pixels, from, in, bias, relu, far); };
    switch (t.type) {
        case Type::float32: return as(float());
        case Type::bfloat16: return as(BFloat16());
        case Type::float16: return as(Float16());
    }
}

bool outputs_are_far(const Plan& plan) {
#if defined(__x86_64__)
    if (__builtin_cpu_is("intel")) return true;
#endif
    const Geometry& g = plan.tiled;
    return plan.images * plan.channels * g.vertical.outputs * g.horizontal.outputs > 512 << 10;
}

namespace {

// Calls visit(first, pixels, offset) for runs of the cropped kernel's taps that lie together in the weight:
// from tap `first` on, and in the cropped kernel from `offset` on.
template <class F>
void for_kernel_runs(const Plan& plan, F visit) {
    const Geometry &whole = plan.geometry, &cropped = plan.cropped;
    if (cropped == whole) return visit(0, whole.taps(), 0);
    const long top = (whole.vertical.padding - cropped.vertical.padding) / whole.vertical.dilation;
    const long left = (whole.horizontal.padding - cropped.horizontal.padding) / whole.horizontal.dilation;
    const long width = cropped.horizontal.taps;
    for (long i = 0; i < cropped.vertical.taps; i++)
        visit((top + i) * whole.horizontal.taps + left, width, i * width);
}

}  // namespace

void gather_kernel(const Plan& plan, const Images& weight, long channel, Blocks to, float* out) {
    for_kernel_runs(plan, [&](long first, long pixels, long offset) {
        gather(weight, 0, channel, first, pixels, to, out + offset * to.pixel_stride);
    });
}

void scatter_kernel(const Plan& plan, const Images& weight, long channel, Blocks from, const float* in) {
    for_kernel_runs(plan, [&](long first, long pixels, long offset) {
        const float* taps = in + offset * from.pixel_stride;
        scatter(weight, 0, channel, first, pixels, from, taps, nullptr, false, false);
    });
}

Images weight_gradient_of(const Plan& plan, float* grad_weight, long part) {
    const long height = plan.geometry.vertical.taps, width = plan.geometry.horizontal.taps;
    return {.data = grad_weight + part * plan.channels * height * width, .type = Type::float32,
            .channels = plan.channels, .height = height, .width = width, .channels_last = false};
}
