// Parts of images that transforms compute.
#pragma once

#include <algorithm>

#include "kernels.h"
#include "layout.h"
#include "simd.h"

// The two blocks of a group: a pixel is a Complex.
constexpr Blocks GROUP{.number = 2, .pixel_stride = PAIR, .block_stride = LANES};

// Some pixels of one group in a tensor.
struct Window {
    const Images& images;
    long image, channel, top, bottom, left, right;
    long width() const { return right - left; }
    long height() const { return bottom - top; }
    bool whole_rows() const { return width() == images.width; }

    // Whether the two blocks lie side by side, so that pixels can be used where they are.
    bool usable_in_place() const {
        return images.channels_last && images.type == Type::float32 && channel + PAIR <= images.channels;
    }
    float* row_in_place(long row) const {
        const long pixel = (image * images.height + row) * images.width + left;
        return (float*)images.data + pixel * images.channels + channel;
    }
};

// What one transform computes: outputs begin ... end, which need the inputs from ... to.
struct Tile {
    long image;
    Span y, x;
    Window inputs(const Images& t, long channel) const {
        return {t, image, channel, y.from, y.to, x.from, x.to};
    }
    Window outputs(const Images& t, long channel) const {
        return {t, image, channel, y.begin, y.end, x.begin, x.end};
    }
};

inline void relu_in_place(float* row, long stride, long width) {
    for (long i = 0; i < width; i++, row += stride)
        for (long b = 0; b < PAIR; b += LANES) store(row + b, at_least(load(row + b), Vec{}));
}

inline Tile tile_of(const Plan& plan, long index) {
    const Axis &vertical = plan.tiled.vertical, &horizontal = plan.tiled.horizontal;
    const long tile = index % plan.tiles();
    const long top = tile / plan.tiles_across * plan.tile_height;
    const long left = tile % plan.tiles_across * plan.tile_width;
    return {index / plan.tiles(), span(vertical, top, std::min(vertical.outputs, top + plan.tile_height)),
            span(horizontal, left, std::min(horizontal.outputs, left + plan.tile_width))};
}
