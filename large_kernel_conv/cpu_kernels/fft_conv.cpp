// The convolution as a product of two-dimensional Fourier transforms.
//
// Two blocks of LANES channels share one complex map (blocks.h): a group. Rows are transformed first, only those that are not
// zero; then the columns kx and -kx together, multiplied while they lie in the cache, and transformed back. Maps larger than a
// transform are cut into tiles that overlap by the kernel (overlap-save).
#include <algorithm>

#include "blocks.h"
#include "fft.h"
#include "kernels.h"
#include "layout.h"
#include "simd.h"

namespace {

constexpr Lanes GROUP{2, PAIR, LANES};  // a group's pixel in memory: Complex

// Intermediate results of one thread.
struct Workspace {
    long row_stride;          // of a map of transformed rows, an odd number of vectors: columns then spread over the cache
    float *map, *second_map;  // transformed rows, [Sy][row_stride]
    float *columns[2], *second_columns[2];
    float *line, *fft;        // some rows of pixels; what Transform asks for
    float *kernel, *spectrum, *sums;  // of one group: the weights, their spectrum, the summed spectrum of their gradient

    explicit Workspace(const Plan& plan) {
        const long sx = plan.rows->size, sy = plan.columns->size, longest = std::max(sx, sy);
        row_stride = (2 * sx + 1) * LANES;
        const long sizes[] = {sy * row_stride, sy * row_stride, sy * PAIR, sy * PAIR, sy * PAIR, sy * PAIR, line_floats(plan),
                              longest * PAIR, plan.kernel_height * plan.kernel_width * PAIR, (long)plan.spectrum_size(),
                              (long)plan.spectrum_size()};
        float** parts[] = {&map, &second_map, &columns[0], &columns[1], &second_columns[0], &second_columns[1], &line,
                           &fft, &kernel, &spectrum, &sums};
        long total = 0;
        for (long size : sizes) total += size;
        float* memory = scratch_memory(total);
        for (int i = 0; i < 11; i++) *parts[i] = memory, memory += sizes[i];
    }
    // rows of pixels that are gathered together: a few short ones, so that transposing them pays
    static long rows_together(const Plan& plan) { return std::max(1L, 128 / plan.width); }
    static long line_floats(const Plan& plan) { return std::max<long>(plan.rows->size, rows_together(plan) * plan.width) * PAIR; }
};

struct Tile {
    long image;
    Span y, x;
};
Span span(long index, long length, long tile, long reach) {
    long begin = index * tile, end = std::min(length, begin + tile);
    return {begin, end, std::max(0L, begin - reach), std::min(length, end + reach)};
}
Tile tile_of(const Plan& plan, long index) {
    const long rest = index % plan.tiles();
    return {index / plan.tiles(), span(rest / plan.tiles_across, plan.height, plan.tile_height, plan.kernel_height / 2),
            span(rest % plan.tiles_across, plan.width, plan.tile_width, plan.kernel_width / 2)};
}

// Whether the two blocks of a group lie side by side in the tensor, so that its pixels can be used where they are.
bool usable_in_place(const Images& t, long channel) {
    return t.channels_last && t.type == Type::float32 && channel + PAIR <= t.channels;
}
float* pixel_in_place(const Images& t, long image, long channel, long row, long column) {
    return (float*)t.data + ((image * t.height + row) * t.width + column) * t.channels + channel;
}

// Asks for a row of pixels ahead of its use: their addresses lie too far apart for the CPU to foresee them.
template <bool WRITTEN>
INLINE void prefetch_row(const float* pixel, long stride, long count) {
    for (long j = 0; j < count; j++, pixel += stride)
        __builtin_prefetch(pixel, WRITTEN), __builtin_prefetch(pixel + LANES, WRITTEN);
}

// Transforms the rows `top` ... `bottom` of a map, columns `left` ... `right`, which stand `offset` elements from the start.
void rows_forward(const Plan& plan, const Images& t, long image, long channel, long top, long bottom, long left, long right,
                  long offset, float* map, const Workspace& w) {
    const int count = offset + right - left;
    if (offset == 0 && usable_in_place(t, channel)) {
        for (long i = top; i < bottom; i++, map += w.row_stride) {
            const float* row = pixel_in_place(t, image, channel, i, left);
            if (i + 1 < bottom) prefetch_row<false>(row + t.width * t.channels, t.channels, count);
            plan.rows->forward(row, t.channels, count, map, PAIR, w.fft);
        }
        return;
    }
    const bool whole = offset == 0 && right - left == plan.width;
    const long together = whole ? w.rows_together(plan) : 1;
    std::fill_n(w.line, offset * PAIR, 0.f);
    for (long i = top; i < bottom; i += together) {
        const long rows = std::min(together, bottom - i);
        gather(t, image, channel, i * plan.width + left, rows * (right - left), GROUP, w.line + offset * PAIR);
        for (long r = 0; r < rows; r++, map += w.row_stride)
            plan.rows->forward(w.line + r * plan.width * PAIR, PAIR, count, map, PAIR, w.fft);
    }
}

// Transforms back what becomes the outputs of a tile.
void rows_inverse(const Plan& plan, const Tile& tile, long channel, const float* map, bool relu, const Images& t,
                  const Workspace& w) {
    const long offset = tile.x.begin - tile.x.from, width = tile.x.end - tile.x.begin;
    map += (tile.y.begin - tile.y.from) * w.row_stride;
    if (offset == 0 && usable_in_place(t, channel)) {
        // outputs of more than 2 MiB are not in a cache from the last call; prefetching smaller ones costs more than it gains
        const bool far = plan.images * plan.channels * plan.height * plan.width > 512 << 10;
        for (long i = tile.y.begin; i < tile.y.end; i++, map += w.row_stride) {
            float* row = pixel_in_place(t, tile.image, channel, i, tile.x.begin);
            if (far && i + 1 < tile.y.end) prefetch_row<true>(row + t.width * t.channels, t.channels, width);
            plan.rows->inverse(map, PAIR, row, t.channels, width, w.fft);
            if (!relu) continue;
            for (long j = 0; j < width; j++, row += t.channels)
                store(row, at_least(load(row), Vec{})), store(row + LANES, at_least(load(row + LANES), Vec{}));
        }
        return;
    }
    const long together = width == plan.width ? w.rows_together(plan) : 1;
    for (long i = tile.y.begin; i < tile.y.end; i += together) {
        const long rows = std::min(together, tile.y.end - i);
        for (long r = 0; r < rows; r++, map += w.row_stride)
            plan.rows->inverse(map, PAIR, w.line + r * plan.width * PAIR, PAIR, offset + width, w.fft);
        scatter(t, tile.image, channel, i * plan.width + tile.x.begin, rows * width, GROUP, w.line + offset * PAIR, nullptr, relu);
    }
}

// Calls visit(kx, columns, mirrored) with the transforms' places in a row for the frequencies kx and -kx.
template <class F>
INLINE void for_column_pairs(const Transform& rows, F visit) {
    for (int kx = 0; kx <= rows.size / 2; kx++)
        visit(kx, rows.position[kx] * PAIR, rows.position[(rows.size - kx) % rows.size] * PAIR);
}
// Calls visit(q, mirrored q) for the frequencies of a pair of columns; a column that mirrors itself holds each of its own twice.
template <class F>
INLINE void for_frequencies(const Transform& columns, bool own_mirror, F visit) {
    for (int q = 0; q < columns.size; q++)
        if (!own_mirror || columns.mirror[q] >= q) visit(q, columns.mirror[q]);
}

// Those of blocks.h for entries in memory.
INLINE Blocks take_apart(const float* z, const float* mirrored) { return take_apart(load_complex(z), load_complex(mirrored)); }
INLINE void put_together(Blocks f, float* z, float* mirrored) {
    Complex at_z, at_mirrored;
    put_together(f, at_z, at_mirrored);
    store(z, at_z), store(mirrored, at_mirrored);
}

// Transforms column `place` of a map, and column `mirrored` too where that is another one; sets the pointers to the results.
INLINE void columns_forward(const Transform& t, const float* map, long place, long mirrored, int count, float* const memory[2],
                            float*& column, float*& mirrored_column, const Workspace& w) {
    column = mirrored_column = memory[0];
    t.forward(map + place, w.row_stride, count, column, PAIR, w.fft);
    if (place == mirrored) return;
    mirrored_column = memory[1];
    t.forward(map + mirrored, w.row_stride, count, mirrored_column, PAIR, w.fft);
}
INLINE void columns_inverse(const Transform& t, float* map, long place, long mirrored, int count, const float* column,
                            const float* mirrored_column, const Workspace& w) {
    t.inverse(column, PAIR, map + place, w.row_stride, count, w.fft);
    if (place != mirrored) t.inverse(mirrored_column, PAIR, map + mirrored, w.row_stride, count, w.fft);
}

// Where tap i of a kernel of `length` taps lies in a sequence of `size`: the middle one at 0, reversed, as a correlation needs.
long tap_place(long i, long length, long size) { return (length / 2 - i + size) % size; }

// The spectrum of a group's kernels, [kx = 0 ... Sx / 2][position of ky][A, B].
void group_spectrum(const Plan& plan, const Images& weight, long channel, float* spectrum, const Workspace& w) {
    const Transform &rows = *plan.rows, &columns = *plan.columns;
    gather_kernel(plan, weight, channel, GROUP, w.kernel);
    std::fill_n(w.map, columns.size * w.row_stride, 0.f);
    std::fill_n(w.line, rows.size * PAIR, 0.f);
    for (long i = 0; i < plan.kernel_height; i++) {
        for (long j = 0; j < plan.kernel_width; j++)
            store(w.line + tap_place(j, plan.kernel_width, rows.size) * PAIR,
                  load_complex(w.kernel + (i * plan.kernel_width + j) * PAIR));
        float* row = w.map + tap_place(i, plan.kernel_height, columns.size) * w.row_stride;
        rows.forward(w.line, PAIR, rows.size, row, PAIR, w.fft);
    }
    // both factors of a product are doubled, and neither transform is scaled
    const Vec scale = splat(0.25f / ((float)rows.size * columns.size));
    for_column_pairs(rows, [&](int kx, long place, long mirrored) {
        float *column, *mirrored_column;
        columns_forward(columns, w.map, place, mirrored, columns.size, w.columns, column, mirrored_column, w);
        for_frequencies(columns, false, [&](int q, int m) {
            const Blocks f = take_apart(column + q * PAIR, mirrored_column + m * PAIR);
            store(spectrum + ((long)kx * columns.size + q) * FREQUENCY, scaled(f, scale));
        });
    });
}

// Columns of a tile: transformed, multiplied by the weights' spectrum, transformed back in place.
void multiply_columns(const Plan& plan, const Tile& tile, const float* spectrum, const float* bias, const Workspace& w) {
    const Transform& columns = *plan.columns;
    const int count = tile.y.to - tile.y.from, wanted = tile.y.end - tile.y.from;
    for_column_pairs(*plan.rows, [&](int kx, long place, long mirrored) {
        const float* weights = spectrum + (long)kx * columns.size * FREQUENCY;
        if (place != mirrored &&
            columns.convolve(w.map + place, w.map + mirrored, w.row_stride, count, wanted, weights, w.columns))
            return;
        float *column, *mirrored_column;
        columns_forward(columns, w.map, place, mirrored, count, w.columns, column, mirrored_column, w);
        for_frequencies(columns, place == mirrored, [&](int q, int m) {
            const Blocks f = take_apart(column + q * PAIR, mirrored_column + m * PAIR);
            put_together(product(f, load_blocks(weights + q * FREQUENCY)), column + q * PAIR, mirrored_column + m * PAIR);
        });
        if (bias && kx == 0) {  // a constant is the frequency 0, which lies first
            for (int i = 0; i < PAIR; i++) column[i] += bias[i];
        }
        columns_inverse(columns, w.map, place, mirrored, wanted, column, mirrored_column, w);
    });
}

// The same with the gradient of y in w.map and x in w.second_map: leaves the gradient of x in w.map where WANT_X, and where
// WANT_WEIGHT adds what the tile contributes to the spectrum of the weight gradient.
template <bool WANT_X, bool WANT_WEIGHT>
void gradient_columns(const Plan& plan, const Tile& tile, const float* spectrum, float* sums, bool first, const Workspace& w) {
    const Transform& columns = *plan.columns;
    const int count = tile.y.to - tile.y.from, wanted = tile.y.end - tile.y.from;
    for_column_pairs(*plan.rows, [&](int kx, long place, long mirrored) {
        float *column, *mirrored_column, *x_column = nullptr, *x_mirrored = nullptr;
        columns_forward(columns, w.map, place, mirrored, count, w.columns, column, mirrored_column, w);
        if (WANT_WEIGHT) columns_forward(columns, w.second_map, place, mirrored, wanted, w.second_columns, x_column, x_mirrored, w);
        const long from = (long)kx * columns.size * FREQUENCY;
        for_frequencies(columns, place == mirrored, [&](int q, int m) {
            const Blocks g = take_apart(column + q * PAIR, mirrored_column + m * PAIR);
            if (WANT_WEIGHT) {
                const Blocks f = take_apart(x_column + q * PAIR, x_mirrored + m * PAIR);
                float* sum = sums + from + q * FREQUENCY;
                store(sum, (first ? Blocks{} : load_blocks(sum)) + product_conjugate(g, f));
            }
            if (WANT_X) {
                const Blocks weights = load_blocks(spectrum + from + q * FREQUENCY);
                put_together(product_conjugate(g, weights), column + q * PAIR, mirrored_column + m * PAIR);
            }
        });
        if (WANT_X) columns_inverse(columns, w.map, place, mirrored, wanted, column, mirrored_column, w);
    });
}

// From the summed spectrum to the weight gradient of a group.
void weight_gradient(const Plan& plan, const float* sums, const Images& grad_weight, long channel, const Workspace& w) {
    const Transform &rows = *plan.rows, &columns = *plan.columns;
    const Vec scale = splat(0.25f / ((float)rows.size * columns.size));
    for_column_pairs(rows, [&](int kx, long place, long mirrored) {
        float* mirrored_column = w.columns[place != mirrored];
        for_frequencies(columns, place == mirrored, [&](int q, int m) {
            const Blocks f = load_blocks(sums + ((long)kx * columns.size + q) * FREQUENCY);
            put_together(scaled(f, scale), w.columns[0] + q * PAIR, mirrored_column + m * PAIR);
        });
        columns_inverse(columns, w.map, place, mirrored, columns.size, w.columns[0], mirrored_column, w);
    });
    for (long i = 0; i < plan.kernel_height; i++) {
        const float* row = w.map + tap_place(i, plan.kernel_height, columns.size) * w.row_stride;
        rows.inverse(row, PAIR, w.line, PAIR, rows.size, w.fft);
        for (long j = 0; j < plan.kernel_width; j++)
            store(w.kernel + (i * plan.kernel_width + j) * PAIR,
                  load_complex(w.line + tap_place(j, plan.kernel_width, rows.size) * PAIR));
    }
    scatter_kernel(plan, grad_weight, channel, GROUP, w.kernel);
}

}  // namespace

void weight_spectra(const Plan& plan, const Images& weight, float* spectra, long begin, long end) {
    Workspace w(plan);
    for (long group = begin; group < end; group++)
        group_spectrum(plan, weight, group * PAIR, spectra + group * plan.spectrum_size(), w);
}

namespace {

// The spectrum of one group, taken from kept spectra if the weights are still those that they were computed from.
struct GroupSpectrum {
    const Plan& plan;
    const Images& weight;
    const Spectra& kept;
    long present = -1;
    const float* spectrum = nullptr;

    const float* of(long group, const Workspace& w) {
        if (group == present) return spectrum;
        present = group, spectrum = kept.spectra + group * plan.spectrum_size();
        if (kept.weights) {
            const long channel = group * PAIR, bytes = weight.bytes_per_channel();
            const long from = channel * bytes, size = std::min<long>(PAIR, plan.channels - channel) * bytes;
            if (std::memcmp((const char*)weight.data + from, kept.weights + from, size)) {
                *kept.stale = true;
                group_spectrum(plan, weight, channel, w.spectrum, w);
                spectrum = w.spectrum;
            }
        }
        return spectrum;
    }
};

}  // namespace

void fft_forward(const Plan& plan, const Images& x, const Images& weight, const Spectra& kept, const float* bias, bool relu,
                 const Images& y, long begin, long end) {
    Workspace w(plan);
    GroupSpectrum spectra{plan, weight, kept};
    const long tasks = plan.images * plan.tiles();
    for (long task = begin; task < end; task++) {
        const long group = task / tasks, channel = group * PAIR;
        const float* spectrum = spectra.of(group, w);
        float group_bias[PAIR] = {};
        if (bias) std::copy_n(bias + channel, std::min<long>(PAIR, plan.channels - channel), group_bias);
        const Tile tile = tile_of(plan, task % tasks);
        rows_forward(plan, x, tile.image, channel, tile.y.from, tile.y.to, tile.x.from, tile.x.to, 0, w.map, w);
        multiply_columns(plan, tile, spectrum, bias ? group_bias : nullptr, w);
        rows_inverse(plan, tile, channel, w.map, relu, y, w);
    }
}

void fft_backward(const Plan& plan, const Images& grad_y, const Images& x, const Images& weight, const Spectra& kept,
                  const Images& grad_x, float* grad_weight, long parts, long begin, long end) {
    Workspace w(plan);
    GroupSpectrum spectra{plan, weight, kept};
    for (long task = begin; task < end; task++) {
        const long group = task / parts, part = task % parts, channel = group * PAIR;
        const float* spectrum = grad_x.data ? spectra.of(group, w) : nullptr;
        const long first = plan.images * part / parts * plan.tiles(), last = plan.images * (part + 1) / parts * plan.tiles();
        for (long i = first; i < last; i++) {
            const Tile tile = tile_of(plan, i);
            rows_forward(plan, grad_y, tile.image, channel, tile.y.from, tile.y.to, tile.x.from, tile.x.to, 0, w.map, w);
            if (grad_weight) {  // x without the overlap, at the same place: each of its pixels counts once
                const long above = tile.y.begin - tile.y.from;
                std::fill_n(w.second_map, above * w.row_stride, 0.f);
                rows_forward(plan, x, tile.image, channel, tile.y.begin, tile.y.end, tile.x.begin, tile.x.end,
                             tile.x.begin - tile.x.from, w.second_map + above * w.row_stride, w);
            }
            if (!grad_weight) gradient_columns<true, false>(plan, tile, spectrum, nullptr, false, w);
            else if (!grad_x.data) gradient_columns<false, true>(plan, tile, nullptr, w.sums, i == first, w);
            else gradient_columns<true, true>(plan, tile, spectrum, w.sums, i == first, w);
            if (grad_x.data) rows_inverse(plan, tile, channel, w.map, false, grad_x, w);
        }
        if (grad_weight) {
            const Images target{grad_weight + part * plan.channels * plan.kernel * plan.kernel, Type::float32, plan.channels,
                                plan.kernel, plan.kernel, false};
            weight_gradient(plan, w.sums, target, channel, w);
        }
    }
}
