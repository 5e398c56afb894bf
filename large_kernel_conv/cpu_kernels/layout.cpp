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
    long i = 0;
    for (; i + LANES <= pixels; i += LANES) visit(i, (long)LANES);
    if (i < pixels) pixels >= LANES ? visit(pixels - LANES, (long)LANES) : visit(i, pixels - i);
}

template <class T>
void gather_as(const Images& t, long image, long channel, long first, long pixels, int blocks, float* out) {
    long area = t.height * t.width, stride = blocks * LANES;
    for (int b = 0; b < blocks; b++, channel += LANES, out += LANES) {
        long lanes = std::clamp(t.channels - channel, 0L, (long)LANES);
        const T* source = pixel_address<T>(t, image, lanes ? channel : 0, first);
        if (!lanes) {
            for (long i = 0; i < pixels; i++) store(out + i * stride, Vec{});
        } else if (t.channels_last) {
            for (long i = 0; i < pixels; i++) store(out + i * stride, load_some(source + i * t.channels, lanes));
        } else {
            for_pixel_blocks(pixels, [&](long i, long count) {
                Vec rows[LANES];
                if (lanes == LANES && count == LANES) {
                    UNROLL for (int c = 0; c < LANES; c++) rows[c] = load_as_float(source + c * area + i);
                    transpose(rows);
                    UNROLL for (int p = 0; p < LANES; p++) store(out + (i + p) * stride, rows[p]);
                } else {
                    for (int c = 0; c < LANES; c++) rows[c] = c < lanes ? load_some(source + c * area + i, count) : Vec{};
                    transpose(rows);
                    for (int p = 0; p < count; p++) store(out + (i + p) * stride, rows[p]);
                }
            });
        }
    }
}

template <class T>
void scatter_as(const Images& t, long image, long channel, long first, long pixels, int blocks, const float* in, const float* bias,
                bool relu) {
    long area = t.height * t.width, stride = blocks * LANES;
    Vec floor = splat(relu ? 0 : -std::numeric_limits<float>::infinity());
    for (int b = 0; b < blocks && channel < t.channels; b++, channel += LANES, in += LANES) {
        long lanes = std::min(t.channels - channel, (long)LANES);
        T* target = pixel_address<T>(t, image, channel, first);
        Vec offset = bias ? load_some(bias + b * LANES, lanes) : Vec{};
        if (t.channels_last) {
            for (long i = 0; i < pixels; i++)
                store_some(target + i * t.channels, at_least(load(in + i * stride) + offset, floor), lanes);
        } else {
            for_pixel_blocks(pixels, [&](long i, long count) {
                auto value = [&](int p) { return at_least(load(in + (i + p) * stride) + offset, floor); };
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
    }
}

}  // namespace

void gather(const Images& t, long image, long channel, long first, long pixels, int blocks, float* out) {
    switch (t.type) {
        case Type::float32: return gather_as<float>(t, image, channel, first, pixels, blocks, out);
        case Type::bfloat16: return gather_as<BFloat16>(t, image, channel, first, pixels, blocks, out);
        case Type::float16: return gather_as<Float16>(t, image, channel, first, pixels, blocks, out);
    }
}

void scatter(const Images& t, long image, long channel, long first, long pixels, int blocks, const float* in, const float* bias,
             bool relu) {
    switch (t.type) {
        case Type::float32: return scatter_as<float>(t, image, channel, first, pixels, blocks, in, bias, relu);
        case Type::bfloat16: return scatter_as<BFloat16>(t, image, channel, first, pixels, blocks, in, bias, relu);
        case Type::float16: return scatter_as<Float16>(t, image, channel, first, pixels, blocks, in, bias, relu);
    }
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

void gather_kernel(const Plan& plan, const Images& weight, long channel, int blocks, float* out) {
    for_kernel_runs(plan, [&](long first, long pixels, long offset) {
        gather(weight, 0, channel, first, pixels, blocks, out + offset * blocks * LANES);
    });
}

void scatter_kernel(const Plan& plan, const Images& weight, long channel, int blocks, const float* in) {
    for_kernel_runs(plan, [&](long first, long pixels, long offset) {
        scatter(weight, 0, channel, first, pixels, blocks, in + offset * blocks * LANES, nullptr, false);
    });
}
