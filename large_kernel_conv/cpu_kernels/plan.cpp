// The choice between the kernels: what each would cost.
#include "plan.h"

#include <algorithm>
#include <limits>

#include "fft.h"

namespace {

static_assert(Geometry::dilation == 1);  // here and in both kernels taps lie side by side

// One axis of a map, and of a kernel over it.
struct Axis {
    long length, kernel, padding;
    // Pixels on one side of an output that it needs, at most.
    long reach() const { return std::max(padding, kernel - 1 - padding); }
};

Axis vertical_axis(long height, const Geometry& g) { return {height, g.kernel_height, g.padding_top}; }
Axis horizontal_axis(long width, const Geometry& g) { return {width, g.kernel_width, g.padding_left}; }

// Without the taps further from an output's own pixel than the map is long, which meet no pixel.
Axis crop(const Axis& axis) {
    const long first = std::max(0L, axis.padding - (axis.length - 1));
    return {axis.length, std::min(axis.kernel, axis.padding + axis.length) - first, axis.padding - first};
}

// Pairs of an output and a tap that meet inside the axis, the padding left out; of a cropped kernel.
double meetings(const Axis& axis) {
    const double before = axis.padding, after = axis.kernel - 1 - axis.padding;  // taps beside its own pixel
    return (double)axis.length * axis.kernel - (before * (before + 1) + after * (after + 1)) / 2;
}

Span span(const Axis& axis, long begin, long end) {
    return {begin, end, std::max(0L, begin - axis.padding),
            std::min(axis.length, end + axis.kernel - 1 - axis.padding)};
}

// An axis in tiles, each of which one transform computes; no transform where none is long enough.
struct Tiling {
    const Transform* transform = nullptr;
    long tile = 0, tiles = 0;  // outputs of a tile; how many of those there are
};

// The cheapest one.
Tiling cut(const Axis& axis) {
    int number;
    const Transform* const* all = transforms(number);
    Tiling best;
    double least = std::numeric_limits<double>::infinity();
    for (int i = 0; i < number; i++) {
        const long size = all[i]->size;
        // one tile wraps around into the zeros beyond the map; of several, each needs its neighbours' pixels
        // on both sides
        const long tile = size >= axis.length + axis.reach() ? axis.length : size - (axis.kernel - 1);
        if (tile <= 0) continue;
        const long tiles = tile == axis.length ? 1 : (axis.length - 1) / tile + 1;  // a division takes long
        const double cost = tiles * (double)all[i]->cost;
        if (cost < least) least = cost, best = {all[i], (axis.length - 1) / tiles + 1, tiles};
    }
    if (best.transform) best.tiles = (axis.length - 1) / best.tile + 1;  // tiles of equal size may be fewer
    return best;
}

// Vector instructions for two blocks of LANES channels. The constants, for what goes with the direct kernel's
// multiplications and with the products of spectra, fit the times measured on Zen 5.
double direct_cost(const Axis& vertical, const Axis& horizontal) {
    return 2 * 1.7 * meetings(vertical) * meetings(horizontal);
}

double fft_cost(const Axis& vertical, const Tiling& down, const Tiling& across) {
    const double rows_in = std::min(vertical.length, down.tile + vertical.kernel - 1), rows_out = down.tile;
    const double points = (double)down.transform->size * across.transform->size;
    const double of_rows = (rows_in + rows_out) * across.transform->cost;
    const double of_columns = 2.0 * across.transform->size * down.transform->cost;
    const long tiles = down.tiles * across.tiles;
    const double in_parts = tiles > 1 ? 1.15 : 1;  // in NCHW, parts of rows are gathered more slowly
    return in_parts * tiles * (of_rows + of_columns + 15 * points);
}

}  // namespace

Geometry same_padding(long kernel_height, long kernel_width) {
    return {.kernel_height = kernel_height, .kernel_width = kernel_width,
            .padding_top = kernel_height / 2, .padding_left = kernel_width / 2};
}

Plan make_plan(long images, long channels, long height, long width, const Geometry& geometry) {
    const Axis vertical = crop(vertical_axis(height, geometry));
    const Axis horizontal = crop(horizontal_axis(width, geometry));
    Plan plan{
        .method = Method::direct,
        .images = images, .channels = channels, .height = height, .width = width,
        .geometry = geometry,
        .cropped = {.kernel_height = vertical.kernel, .kernel_width = horizontal.kernel,
                    .padding_top = vertical.padding, .padding_left = horizontal.padding}};
    const Tiling down = cut(vertical), across = cut(horizontal);
    if (!down.transform || !across.transform) return plan;
    if (fft_cost(vertical, down, across) >= direct_cost(vertical, horizontal)) return plan;
    plan.method = Method::fft;
    plan.row_transform = across.transform, plan.column_transform = down.transform;
    plan.tile_height = down.tile, plan.tile_width = across.tile;
    plan.tiles_down = down.tiles, plan.tiles_across = across.tiles;
    return plan;
}

long Plan::channel_groups() const { return (channels - 1) / (method == Method::fft ? PAIR : LANES) + 1; }

long Plan::spectrum_size() const {
    return method == Method::fft ? (long)row_transform->size * column_transform->size * PAIR : 0;
}

Span vertical_span(const Plan& plan, long begin, long end) {
    return span(vertical_axis(plan.height, plan.cropped), begin, end);
}

Span horizontal_span(const Plan& plan, long begin, long end) {
    return span(horizontal_axis(plan.width, plan.cropped), begin, end);
}
