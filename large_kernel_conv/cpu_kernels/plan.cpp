// The choice between the kernels: what each would cost.
#include "plan.h"

#include <algorithm>
#include <limits>

#include "fft.h"

namespace {

// a / step, rounded down.
long steps(long a, long step) { return a >= 0 ? a / step : -((step - 1 - a) / step); }

// Taps at the beginning that meet no input, as many as can be left out: the paddings must not become negative
// nor larger than the reach.
long idle_taps(const Axis& a) {
    const long idle = std::max(0L, steps(a.padding - a.outputs, a.dilation) + 1);
    return std::min({idle, a.padding / a.dilation, (a.padding + a.inputs - a.outputs) / a.dilation});
}

Axis crop(const Axis& axis) {
    Axis mirrored = axis;
    mirrored.padding = axis.padding_after();
    const long before = idle_taps(axis), after = idle_taps(mirrored);
    Axis cropped = axis;
    cropped.taps -= before + after, cropped.padding -= before * axis.dilation;
    return cropped;
}

// Pairs of an output and a tap that meet an input.
double meetings(const Axis& a) {
    long pairs = 0;
    for (long i = 0, first = a.padding; i < a.taps; i++, first -= a.dilation)  // `first` meets input 0
        pairs += std::max(0L, std::min(a.outputs, first + a.inputs) - std::max(0L, first));
    return pairs;
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
    const long zeros = std::max(axis.padding, axis.padding_after());
    for (int i = 0; i < number; i++) {
        const long size = all[i]->size;
        // one tile wraps around into the zeros beyond the inputs; of several, each needs its neighbours'
        // pixels on both sides
        const long tile = size >= axis.inputs + zeros ? axis.outputs : size - axis.reach();
        if (tile <= 0) continue;
        const long tiles = tile == axis.outputs ? 1 : (axis.outputs - 1) / tile + 1;  // divisions take long
        const double cost = tiles * (double)all[i]->cost;
        if (cost < least) least = cost, best = {all[i], (axis.outputs - 1) / tiles + 1, tiles};
    }
    if (best.transform) best.tiles = (axis.outputs - 1) / best.tile + 1;  // tiles of equal size may be fewer
    return best;
}

// Vector instructions for two blocks of LANES channels. The constants, for what goes with the direct kernel's
// multiplications and with the products of spectra, fit the times measured on Zen 5.
double direct_cost(const Geometry& g) { return 2 * 1.7 * meetings(g.vertical) * meetings(g.horizontal); }

double fft_cost(const Axis& vertical, const Tiling& down, const Tiling& across) {
    const double rows_in = std::min(vertical.inputs, down.tile + vertical.reach()), rows_out = down.tile;
    const double points = (double)down.transform->size * across.transform->size;
    const double of_rows = (rows_in + rows_out) * across.transform->cost;
    const double of_columns = 2.0 * across.transform->size * down.transform->cost;
    const long tiles = down.tiles * across.tiles;
    const double in_parts = tiles > 1 ? 1.15 : 1;  // in NCHW, parts of rows are gathered more slowly
    return in_parts * tiles * (of_rows + of_columns + 15 * points);
}

// Of `lines` transforms along one axis.
double lines_cost(long lines, const Tiling& along) {
    return lines * along.tiles * (2.0 * along.transform->cost + 15 * along.transform->size);
}

// In a tile of lines, about; of columns at least as many as are transposed together.
constexpr long PIXELS_OF_LINES = 512;

void choose_lines(Plan& plan) {
    const Axis &vertical = plan.tiled.vertical, &horizontal = plan.tiled.horizontal;
    const bool across = vertical.taps == 1;
    const long lines = across ? vertical.outputs : horizontal.outputs;
    const Tiling along = cut(across ? horizontal : vertical);
    if (!along.transform || lines_cost(lines, along) >= direct_cost(plan.tiled)) return;
    plan.method = Method::lines;
    const long least = across ? 1 : LANES;
    const long together = std::min(lines, std::max(least, PIXELS_OF_LINES / along.transform->size));
    const long tiles = (lines - 1) / together + 1;
    if (across) {
        plan.row_transform = along.transform;
        plan.tile_width = along.tile, plan.tiles_across = along.tiles;
        plan.tile_height = together, plan.tiles_down = tiles;
    } else {
        plan.column_transform = along.transform;
        plan.tile_height = along.tile, plan.tiles_down = along.tiles;
        plan.tile_width = together, plan.tiles_across = tiles;
    }
}

void choose_fft(Plan& plan) {
    const Tiling down = cut(plan.tiled.vertical), across = cut(plan.tiled.horizontal);
    if (!down.transform || !across.transform) return;
    if (fft_cost(plan.tiled.vertical, down, across) >= direct_cost(plan.tiled)) return;
    plan.method = Method::fft;
    plan.row_transform = across.transform, plan.column_transform = down.transform;
    plan.tile_height = down.tile, plan.tile_width = across.tile;
    plan.tiles_down = down.tiles, plan.tiles_across = across.tiles;
}

}  // namespace

Plan make_plan(long images, long channels, const Geometry& geometry, Pass pass) {
    const Geometry cropped{crop(geometry.vertical), crop(geometry.horizontal)};
    Plan plan{.method = Method::direct, .images = images, .channels = channels, .geometry = geometry,
              .cropped = cropped, .tiled = pass == Pass::forward ? cropped : cropped.reversed()};
    if (cropped.vertical.taps == 1 || cropped.horizontal.taps == 1) choose_lines(plan);
    else choose_fft(plan);
    return plan;
}

long Plan::channel_groups() const { return (channels - 1) / (method == Method::direct ? LANES : PAIR) + 1; }

long Plan::spectrum_size() const {
    const long across = row_transform ? row_transform->size : 1;
    const long down = column_transform ? column_transform->size : 1;
    return method == Method::direct ? 0 : across * down * PAIR;
}

Span span(const Axis& axis, long begin, long end) {
    return {begin, end, std::max(0L, begin - axis.padding),
            std::min(axis.inputs, end + axis.reach() - axis.padding)};
}
