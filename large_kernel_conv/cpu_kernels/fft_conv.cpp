// The convolution as a product of two-dimensional Fourier transforms.
//
// Two blocks of LANES channels, a group, are the real and the imaginary part of one complex map. Rows are transformed first, only
// those that are not zero, and the two blocks' spectra taken apart; then each column is transformed, multiplied while it lies in
// the cache, and transformed back. Maps larger than a transform are cut into tiles that overlap by the kernel (overlap-save).
#include <algorithm>

#include "ahead.h"
#include "digest.h"
#include "fft.h"
#include "kernels.h"
#include "layout.h"
#include "simd.h"
#include "sums.h"

namespace {

constexpr Lanes GROUP{2, PAIR, LANES};  // a group's pixel in memory: Complex

// Tiles whose spectra are added up one by one for the weight gradient. Such sums are added in pairs, in passes of their own.
constexpr long CHAIN = 32;

// Intermediate results of one thread.
struct Workspace {
    long row_stride;          // of a map of transformed rows, an odd number of vectors: columns then spread over the cache
    float *map, *second_map;  // [Sy][row_stride]
    float *column, *second_column;
    float *line, *fft;        // some rows of pixels; the transforms' scratch
    float *kernel, *spectrum, *sums;  // of one group: the weights, their spectrum, sums of their gradient's spectra

    // `terms`: of those sums.
    explicit Workspace(const Plan& plan, long terms = 0) {
        const long sx = plan.rows->size, sy = plan.columns->size;
        row_stride = sx * PAIR + LANES;
        const long sizes[] = {sy * row_stride, sy * row_stride, sy * PAIR, sy * PAIR, line_floats(plan), std::max(sx, sy) * PAIR,
                              plan.kernel_height * plan.kernel_width * PAIR, (long)plan.spectrum_size(),
                              terms ? PairwiseSum::slots(terms) * (long)plan.spectrum_size() : 0};
        float** parts[] = {&map, &second_map, &column, &second_column, &line, &fft, &kernel, &spectrum, &sums};
        long total = 0;
        for (long size : sizes) total += size;
        float* memory = scratch_memory(total);
        for (int i = 0; i < 9; i++) *parts[i] = memory, memory += sizes[i];
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

// Rows of a group's pixels, for transforms to ask for, `rows` at a time: those above `bottom`, or a few more.
class RowsAhead {
  public:
    RowsAhead(const Plan& plan, const Images& t, long image, long channel, long column, long width, long bottom, long rows,
              bool written)
        : bottom(bottom), runs(t.channels_last ? rows * width : std::min<long>(PAIR, t.channels - channel)) {
        const long element = t.element_size(), plane = t.bytes_per_channel();
        const long pixel = t.channels_last ? t.channels * element : element;
        row_bytes = t.width * pixel;
        first_row = (const char*)t.data + image * t.channels * plane + channel * (t.channels_last ? element : plane) + column * pixel;
        ahead.stride = t.channels_last ? pixel : plane;
        ahead.bytes = element * (t.channels_last ? PAIR : rows * width);
        ahead.each = (runs - 1) / (rows * plan.rows->steps) + 1, ahead.written = written;
    }
    Ahead* from(long row) {
        if (row >= bottom) return nullptr;
        ahead.place = first_row + row * row_bytes, ahead.runs = runs;
        return &ahead;
    }

  private:
    long bottom, runs, row_bytes;
    const char* first_row;
    Ahead ahead;
};

// Transforms the rows `top` ... `bottom` of a map, columns `left` ... `right`, which stand `offset` elements from the start.
void rows_forward(const Plan& plan, const Images& t, long image, long channel, long top, long bottom, long left, long right,
                  long offset, float* map, const Workspace& w) {
    const long width = right - left, count = offset + width;
    const bool in_place = offset == 0 && usable_in_place(t, channel);
    const long together = in_place || offset || width < plan.width ? 1 : w.rows_together(plan);
    RowsAhead ahead(plan, t, image, channel, left, width, bottom, together, false);
    if (in_place) {
        for (long i = top; i < bottom; i++, map += w.row_stride)
            plan.rows->forward_real(pixel_in_place(t, image, channel, i, left), t.channels, count, map, w.fft, ahead.from(i + 1));
        return;
    }
    std::fill_n(w.line, offset * PAIR, 0.f);
    for (long i = top; i < bottom; i += together) {
        const long rows = std::min(together, bottom - i);
        gather(t, image, channel, i * plan.width + left, rows * width, GROUP, w.line + offset * PAIR);
        Ahead* next = ahead.from(i + rows);
        for (long r = 0; r < rows; r++, map += w.row_stride)
            plan.rows->forward_real(w.line + r * plan.width * PAIR, PAIR, count, map, w.fft, next);
    }
}

// Transforms back what becomes the outputs of a tile.
void rows_inverse(const Plan& plan, const Tile& tile, long channel, const float* map, bool relu, const Images& t,
                  const Workspace& w) {
    const long left = tile.x.begin, width = tile.x.end - left, first = left - tile.x.from, count = first + width;
    const bool in_place = usable_in_place(t, channel);
    const long together = in_place || width < plan.width ? 1 : w.rows_together(plan);
    const bool far = outputs_are_far(plan);
    RowsAhead ahead(plan, t, tile.image, channel, left, width, far ? tile.y.end : 0, together, true);
    map += (tile.y.begin - tile.y.from) * w.row_stride;
    if (in_place) {
        for (long i = tile.y.begin; i < tile.y.end; i++, map += w.row_stride) {
            float* row = pixel_in_place(t, tile.image, channel, i, left);
            plan.rows->inverse_real(map, row - first * t.channels, t.channels, first, count, w.fft, ahead.from(i + 1));
            if (!relu) continue;
            for (long j = 0; j < width; j++, row += t.channels)
                store(row, at_least(load(row), Vec{})), store(row + LANES, at_least(load(row + LANES), Vec{}));
        }
        return;
    }
    for (long i = tile.y.begin; i < tile.y.end; i += together) {
        const long rows = std::min(together, tile.y.end - i);
        Ahead* same = ahead.from(i);  // scatter comes afterwards, and need not ask
        for (long r = 0; r < rows; r++, map += w.row_stride)
            plan.rows->inverse_real(map, w.line + r * plan.width * PAIR, PAIR, first, count, w.fft, same);
        scatter(t, tile.image, channel, i * plan.width + left, rows * width, GROUP, w.line + first * PAIR, nullptr, relu, false);
    }
}

// Columns of a map, [coefficient]. Those of packed numbers are two real sequences, one of each block.
void column_forward(const Transform& t, long column, const float* map, int count, float* out, const Workspace& w) {
    if (column < PACKED) t.forward_real(map + column * PAIR, w.row_stride, count, out, w.fft, nullptr);
    else t.forward(map + column * PAIR, w.row_stride, count, out, w.fft);
}
void column_inverse(const Transform& t, long column, const float* in, float* map, int count, const Workspace& w) {
    if (column < PACKED) t.inverse_real(in, map + column * PAIR, w.row_stride, 0, count, w.fft, nullptr);
    else t.inverse(in, map + column * PAIR, w.row_stride, count, w.fft);
}
// Whether coefficient i of a column is two real numbers, one of each block, which were not doubled.
INLINE bool is_packed(long column, long i) { return column < PACKED && i < PACKED; }
INLINE Complex product_of_packed(Complex a, Complex b) {  // times 4, as that of two others, each of which was doubled
    const Vec four = splat(4);
    return {four * a.re * b.re, four * a.im * b.im};
}
// What makes up for doubled factors, and for transforms that do not scale.
Vec scale_of(const Plan& plan) { return splat(0.25f / ((float)plan.rows->size * plan.columns->size)); }

// Where tap i of a kernel of `length` taps lies in a sequence of `size`: the middle one at 0, reversed, as a correlation needs.
long tap_place(long i, long length, long size) { return (length / 2 - i + size) % size; }

// The spectrum of a group's kernels, [column][coefficient].
void group_spectrum(const Plan& plan, const Images& weight, long channel, float* spectrum, const Workspace& w) {
    const Transform &rows = *plan.rows, &columns = *plan.columns;
    const Vec scale = scale_of(plan);
    gather_kernel(plan, weight, channel, GROUP, w.kernel);
    std::fill_n(w.map, columns.size * w.row_stride, 0.f);
    std::fill_n(w.line, rows.size * PAIR, 0.f);
    for (long i = 0; i < plan.kernel_height; i++) {
        for (long j = 0; j < plan.kernel_width; j++)
            store(w.line + tap_place(j, plan.kernel_width, rows.size) * PAIR,
                  scaled(load_complex(w.kernel + (i * plan.kernel_width + j) * PAIR), scale));
        float* row = w.map + tap_place(i, plan.kernel_height, columns.size) * w.row_stride;
        rows.forward_real(w.line, PAIR, rows.size, row, w.fft, nullptr);
    }
    for (long column = 0; column < rows.size; column++)
        column_forward(columns, column, w.map, columns.size, spectrum + column * columns.size * PAIR, w);
}

// Columns of a tile: transformed, multiplied by the weights' spectrum, transformed back in place.
void multiply_columns(const Plan& plan, const Tile& tile, const float* spectrum, const float* bias, const Workspace& w) {
    const Transform& columns = *plan.columns;
    const int count = tile.y.to - tile.y.from, wanted = tile.y.end - tile.y.from;
    for (long column = 0; column < plan.rows->size; column++, spectrum += columns.size * PAIR) {
        if (column >= PACKED) {
            columns.convolve(w.map + column * PAIR, w.row_stride, count, wanted, spectrum, w.fft);
            continue;
        }
        column_forward(columns, column, w.map, count, w.column, w);
        for (long i = 0; i < columns.size; i++) {
            const Complex x = load_complex(w.column + i * PAIR), f = load_complex(spectrum + i * PAIR);
            store(w.column + i * PAIR, is_packed(column, i) ? product_of_packed(x, f) : product(x, f));
        }
        column_inverse(columns, column, w.column, w.map, wanted, w);
    }
    if (!bias) return;
    for (float* row = w.map; row < w.map + wanted * w.row_stride; row += w.row_stride)  // a constant is the frequency 0
        store(row, load_complex(row) + load_complex(bias));
}

// The same with the gradient of y in w.map and x in w.second_map: leaves the gradient of x in w.map where WANT_X, and where
// WANT_WEIGHT adds what the tile contributes to the spectrum of the weight gradient; the `first` one is not added, but written.
template <bool WANT_X, bool WANT_WEIGHT>
void gradient_columns(const Plan& plan, const Tile& tile, const float* spectrum, float* sums, bool first, const Workspace& w) {
    const Transform& columns = *plan.columns;
    const int count = tile.y.to - tile.y.from, wanted = tile.y.end - tile.y.from;
    for (long column = 0; column < plan.rows->size; column++) {
        column_forward(columns, column, w.map, count, w.column, w);
        if (WANT_WEIGHT) column_forward(columns, column, w.second_map, wanted, w.second_column, w);
        for (long i = 0; i < columns.size; i++) {
            const long place = (column * columns.size + i) * PAIR;
            const Complex g = load_complex(w.column + i * PAIR);
            auto times = [&](const float* p) {
                const Complex f = load_complex(p);
                return is_packed(column, i) ? product_of_packed(g, f) : product_conjugate(g, f);
            };
            if (WANT_WEIGHT)
                store(sums + place, (first ? Complex{} : load_complex(sums + place)) + times(w.second_column + i * PAIR));
            if (WANT_X) store(w.column + i * PAIR, times(spectrum + place));
        }
        if (WANT_X) column_inverse(columns, column, w.column, w.map, wanted, w);
    }
}

// From the summed spectrum to the weight gradient of a group.
void weight_gradient(const Plan& plan, const float* sums, const Images& grad_weight, long channel, const Workspace& w) {
    const Transform &rows = *plan.rows, &columns = *plan.columns;
    const Vec scale = scale_of(plan);
    for (long column = 0; column < rows.size; column++)
        column_inverse(columns, column, sums + column * columns.size * PAIR, w.map, columns.size, w);
    for (long i = 0; i < plan.kernel_height; i++) {
        const float* row = w.map + tap_place(i, plan.kernel_height, columns.size) * w.row_stride;
        rows.inverse_real(row, w.line, PAIR, 0, rows.size, w.fft, nullptr);
        for (long j = 0; j < plan.kernel_width; j++)
            store(w.kernel + (i * plan.kernel_width + j) * PAIR,
                  scaled(load_complex(w.line + tap_place(j, plan.kernel_width, rows.size) * PAIR), scale));
    }
    scatter_kernel(plan, grad_weight, channel, GROUP, w.kernel);
}

}  // namespace

Digest group_digest(const Plan& plan, const Images& weight, long group) {
    const long channel = group * PAIR, channels = std::min<long>(PAIR, plan.channels - channel);
    return {(const char*)weight.data + channel * weight.bytes_per_channel(), channels * weight.bytes_per_channel()};
}

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
        if (kept.digests && !(kept.digests[group] == group_digest(plan, weight, group))) {
            *kept.stale = true;
            group_spectrum(plan, weight, group * PAIR, w.spectrum, w);
            spectrum = w.spectrum;
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
    const long most_tiles = ((plan.images - 1) / parts + 1) * plan.tiles();  // of a part
    Workspace w(plan, grad_weight ? (most_tiles - 1) / CHAIN + 1 : 0);
    GroupSpectrum spectra{plan, weight, kept};
    for (long task = begin; task < end; task++) {
        const long group = task / parts, part = task % parts, channel = group * PAIR;
        const float* spectrum = grad_x.data ? spectra.of(group, w) : nullptr;
        const long first = plan.images * part / parts * plan.tiles(), last = plan.images * (part + 1) / parts * plan.tiles();
        PairwiseSum sums(w.sums, plan.spectrum_size());
        for (long i = first; i < last; i++) {
            const Tile tile = tile_of(plan, i);
            const bool begins_chain = (i - first) % CHAIN == 0, ends_chain = (i + 1 - first) % CHAIN == 0 || i + 1 == last;
            rows_forward(plan, grad_y, tile.image, channel, tile.y.from, tile.y.to, tile.x.from, tile.x.to, 0, w.map, w);
            if (grad_weight) {  // x without the overlap, at the same place: each of its pixels counts once
                const long above = tile.y.begin - tile.y.from;
                std::fill_n(w.second_map, above * w.row_stride, 0.f);
                rows_forward(plan, x, tile.image, channel, tile.y.begin, tile.y.end, tile.x.begin, tile.x.end,
                             tile.x.begin - tile.x.from, w.second_map + above * w.row_stride, w);
            }
            if (!grad_weight) gradient_columns<true, false>(plan, tile, spectrum, nullptr, false, w);
            else if (!grad_x.data) gradient_columns<false, true>(plan, tile, nullptr, sums.term(), begins_chain, w);
            else gradient_columns<true, true>(plan, tile, spectrum, sums.term(), begins_chain, w);
            if (grad_weight && ends_chain) sums.add();
            if (grad_x.data) rows_inverse(plan, tile, channel, w.map, false, grad_x, w);
        }
        if (grad_weight) {
            const Images target{grad_weight + part * plan.channels * plan.kernel * plan.kernel, Type::float32, plan.channels,
                                plan.kernel, plan.kernel, false};
            weight_gradient(plan, sums.total(), target, channel, w);
        }
    }
}
