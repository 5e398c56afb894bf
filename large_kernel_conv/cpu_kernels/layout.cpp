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
    long area = t.height * t.width;
    return (T*)t.data + image * t.channels * area + (t.channels_last ? pixel * t.channels + channel : channel * area + pixel);
}

// Calls visit(first, count) for blocks of LANES pixels; a last incomplete block starts earlier if there is room.
template <class F>
INLINE void for_pixel_blocks(long pixels, F visit) {
    const long count = std::min(pixels, (long)LANES);
    for (long i = 0; i < pixels; i += LANES) visit(std::min(i, pixels - count), count);
}

// Channels of block b, of those from `channel` on.
INLINE long lanes_of(const Images& t, long channel, long b) {
    return std::clamp(t.channels - channel - b * LANES, 0L, (long)LANES);
}

// Calls visit(pixel, block, lanes): in channels_last all blocks of a pixel before the next one, which may lie on another page.
template <class F>
INLINE void for_pixels(const Images& t, long channel, long pixels, long blocks, F visit) {
    if (channel + blocks * LANES <= t.channels) {
        for (long i = 0; i < pixels; i++)
            for (long b = 0; b < blocks; b++) visit(i, b, (long)LANES);
    } else {
        for (long i = 0; i < pixels; i++)
            for (long b = 0; b < blocks; b++) visit(i, b, lanes_of(t, channel, b));
    }
}

// One block of a contiguous image, whose channels lie `area` apart.
template <class T>
INLINE void gather_planes(const T* source, long area, long pixels, long lanes, float* out, long step) {
    for_pixel_blocks(pixels, [&](long i, long count) {
        Vec rows[LANES];
        if (lanes == LANES && count == LANES) {
            UNROLL for (int c = 0; c < LANES; c++) rows[c] = load_as_float(source + c * area + i);
            transpose(rows);
            UNROLL for (int p = 0; p < LANES; p++) store(out + (i + p) * step, rows[p]);
        } else {
            for (int c = 0; c < LANES; c++) rows[c] = c < lanes ? load_some(source + c * area + i, count) : Vec{};
            transpose(rows);
            for (int p = 0; p < count; p++) store(out + (i + p) * step, rows[p]);
        }
    });
}

template <class T>
INLINE void scatter_planes(T* target, long area, long pixels, long lanes, const float* in, long step, Vec offset, Vec floor) {
    for_pixel_blocks(pixels, [&](long i, long count) {
        auto value = [&](int p) { return at_least(load(in + (i + p) * step) + offset, floor); };
        Vec rows[LANES];
        if (lanes == LANES && count == LANES) {
            UNROLL for (int p = 0; p < LANES; p++) rows[p] = value(p);
            transpose(rows);
            UNROLL for (int c = 0; c < LANES; c++) store_from_float(target + c * area + i, rows[c]);
        } else {
            for (int p = 0; p < LANES; p++) rows[p] = p < count ? value(p) : Vec{};
            transpose(rows);
            for (int c = 0; c < lanes; c++) store_some(target + c * area + i, rows[c], count);
        }
    });
}

// Pixels in channels_last may lie too far apart for the CPU to foresee them. Those of 1024 channels share one place in a first
// cache, which has room for 8 or 12 of them. Asking for some beyond the last is no access.
constexpr long AHEAD = 8;

template <class T>
void gather_as(const Images& t, long image, long channel, long first, long pixels, Lanes to, float* out) {
    const long area = t.height * t.width, channels = t.channels, step = to.pixel, block = to.block;
    const T* const source = pixel_address<T>(t, image, channel, first);
    if (t.channels_last) {
        for_pixels(t, channel, pixels, to.blocks, [&](long i, long b, long lanes) {
            __builtin_prefetch(source + (i + AHEAD) * channels + b * LANES);
            store(out + i * step + b * block, load_some(source + i * channels + b * LANES, lanes));
        });
    } else {
        for (long b = 0; b < to.blocks; b++)
            gather_planes(source + b * LANES * area, area, pixels, lanes_of(t, channel, b), out + b * block, step);
    }
}

template <class T>
void scatter_as(const Images& t, long image, long channel, long first, long pixels, Lanes from, const float* in, const float* bias,
                bool relu, bool far) {
    const long area = t.height * t.width, channels = t.channels, step = from.pixel, block = from.block;
    const Vec floor = splat(relu ? 0 : -std::numeric_limits<float>::infinity());
    T* const target = pixel_address<T>(t, image, channel, first);
    Vec offset[MOST_BLOCKS];
    for (long b = 0; b < from.blocks; b++) offset[b] = bias ? load_some(bias + b * LANES, lanes_of(t, channel, b)) : Vec{};
    if (t.channels_last) {
        for_pixels(t, channel, pixels, from.blocks, [&](long i, long b, long lanes) {
            if (far) __builtin_prefetch(target + (i + AHEAD) * channels + b * LANES, 1);
            const Vec value = at_least(load(in + i * step + b * block) + offset[b], floor);
            store_some(target + i * channels + b * LANES, value, lanes);
        });
    } else {
        for (long b = 0; b < from.blocks; b++)
            scatter_planes(target + b * LANES * area, area, pixels, lanes_of(t, channel, b), in + b * block, step, offset[b], floor);
    }
}

}  // namespace

void gather(const Images& t, long image, long channel, long first, long pixels, Lanes to, float* out) {
    switch (t.type) {
        case Type::float32: return gather_as<float>(t, image, channel, first, pixels, to, out);
        case Type::bfloat16: return gather_as<BFloat16>(t, image, channel, first, pixels, to, out);
        case Type::float16: return gather_as<Float16>(t, image, channel, first, pixels, to, out);
    }
}

void scatter(const Images& t, long image, long channel, long first, long pixels, Lanes from, const float* in, const float* bias,
             bool relu, bool far) {
    switch (t.type) {
        case Type::float32: return scatter_as<float>(t, image, channel, first, pixels, from, in, bias, relu, far);
        case Type::bfloat16: return scatter_as<BFloat16>(t, image, channel, first, pixels, from, in, bias, relu, far);
        case Type::float16: return scatter_as<Float16>(t, image, channel, first, pixels, from, in, bias, relu, far);
    }
}

bool outputs_are_far(const Plan& plan) {
#if defined(__x86_64__)
    if (__builtin_cpu_is("intel")) return true;
#endif
    return plan.images * plan.channels * plan.height * plan.width > 512 << 10;
}

namespace {

// Calls visit(first, pixels, offset) for runs of taps that lie together in the weight.
template <class F>
void for_kernel_runs(const Plan& plan, F visit) {
    if (plan.kernel_width == plan.kernel && plan.kernel_height == plan.kernel) return visit(0, plan.kernel * plan.kernel, 0);
    long top = (plan.kernel - plan.kernel_height) / 2, left = (plan.kernel - plan.kernel_width) / 2;
    for (long i = 0; i < plan.kernel_height; i++)
        visit((top + i) * plan.kernel + left, plan.kernel_width, i * plan.kernel_width);
}

}  // namespace

void gather_kernel(const Plan& plan, const Images& weight, long channel, Lanes to, float* out) {
    for_kernel_runs(plan, [&](long first, long pixels, long offset) {
        gather(weight, 0, channel, first, pixels, to, out + offset * to.pixel);
    });
}

void scatter_kernel(const Plan& plan, const Images& weight, long channel, Lanes from, const float* in) {
    for_kernel_runs(plan, [&](long first, long pixels, long offset) {
        scatter(weight, 0, channel, first, pixels, from, in + offset * from.pixel, nullptr, false, false);
    });
}
