// The convolution as a product of two-dimensional Fourier transforms. README.md explains what is done here,
// and why.
//
// Two blocks of LANES channels, a group, are the real and the imaginary part of one complex map. Rows are
// transformed first, only those that are not zero, and the two blocks' spectra taken apart; then each column
// is transformed, multiplied while it lies in the cache, and transformed back. Maps larger than a transform
// are cut into tiles that overlap by the kernel (overlap-save).
#include <algorithm>

#include "ahead.h"
#include "fft.h"
#include "layout.h"
#include "memory.h"
#include "methods.h"
#include "simd.h"
#include "spectra.h"
#include "sums.h"
#include "tile.h"

namespace {

// Tiles whose spectra are added up one by one for the weight gradient. Such sums are added in pairs, in
// passes of their own.
constexpr long TILES_IN_CHAIN = 32;

// Rows of pixels that are gathered together: a few short ones, so that transposing them pays.
long rows_together(long width) { return std::max(1L, 128 / width); }

// Intermediate results of one thread. A map is transformed rows, [row][coefficient] of Complex.
struct Workspace {
    long row_stride;                // of a map, an odd number of vectors: columns then spread over the cache
    Buffer map, second_map;         // second_*: of x, for the weight gradient
    Buffer column, second_column;   // a map's column, transformed
    Buffer line;                    // some rows of pixels
    Buffer fft;                     // the transforms' scratch
    Buffer kernel, spectrum, sums;  // of a group: weights, their spectrum, sums of their gradient's spectra
};

// `terms`: of the sums; none where no weight gradient is wanted.
Workspace make_workspace(const Plan& plan, long terms = 0) {
    const long sx = plan.row_transform->size, sy = plan.column_transform->size;
    const long row_stride = sx * PAIR + LANES;
    const long pixels = std::max(sx, 128L);  // of one row, or of rows_together
    Workspace w{
        .row_stride = row_stride,
        .map = {sy * row_stride},
        .second_map = {sy * row_stride},
        .column = {sy * PAIR},
        .second_column = {sy * PAIR},
        .line = {pixels * PAIR},
        .fft = {std::max(sx, sy) * PAIR},
        .kernel = {plan.cropped.taps() * PAIR},
        .spectrum = {plan.spectrum_size()},
        .sums = {terms ? PairwiseSum::slots(terms) * plan.spectrum_size() : 0},
    };
    thread_arena().place({&w.map, &w.second_map, &w.column, &w.second_column, &w.line, &w.fft, &w.kernel,
                          &w.spectrum, &w.sums});
    return w;
}

// Rows of a window, for transforms to ask for, `rows` at a time: those above `bottom`, or a few more.
class RowsAhead {
  public:
    RowsAhead(const Plan& plan, const Window& w, long bottom, long rows, bool written) : bottom(bottom) {
        const Images& t = w.images;
        const long element = t.element_size(), plane = t.bytes_per_channel();
        const long pixel = t.channels_last ? t.channels * element : element;
        row_bytes = t.width * pixel;
        first_row = (const char*)t.data + w.image * t.channels * plane +
                    w.channel * (t.channels_last ? element : plane) + w.left * pixel;
        runs = t.channels_last ? rows * w.width() : std::min<long>(PAIR, t.channels - w.channel);
        ahead.stride = t.channels_last ? pixel : plane;
        ahead.bytes = element * (t.channels_last ? PAIR : rows * w.width());
        ahead.each = (runs - 1) / (rows * plan.row_transform->steps) + 1, ahead.written = written;
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

// Transforms the rows of a window, whose pixels stand `offset` elements from the start of a sequence.
void rows_forward(const Plan& plan, const Window& in, long offset, float* map, const Workspace& w) {
    const Transform& rows = *plan.row_transform;
    const long width = in.width(), count = offset + width;
    const bool in_place = offset == 0 && in.usable_in_place();
    const long together = in_place || offset || !in.whole_rows() ? 1 : rows_together(width);
    RowsAhead ahead(plan, in, in.bottom, together, false);
    if (in_place) {
        for (long i = in.top; i < in.bottom; i++, map += w.row_stride)
            rows.forward_real(in.row_in_place(i), in.images.channels, count, map, w.fft, ahead.from(i + 1));
        return;
    }
    std::fill_n(w.line.data, offset * PAIR, 0.f);
    for (long i = in.top; i < in.bottom; i += together) {
        const long number = std::min(together, in.bottom - i);
        gather(in.images, in.image, in.channel, i * in.images.width + in.left, number * width, GROUP,
               w.line + offset * PAIR);
        Ahead* next = ahead.from(i + number);
        for (long r = 0; r < number; r++, map += w.row_stride)
            rows.forward_real(w.line + r * width * PAIR, PAIR, count, map, w.fft, next);
    }
}

// Transforms back the rows of w.map that become the outputs of a tile.
void rows_inverse(const Plan& plan, const Tile& tile, const Window& out, bool relu, const Workspace& w) {
    const Transform& rows = *plan.row_transform;
    const long width = out.width(), first = tile.x.begin - tile.x.from, count = first + width;
    const bool in_place = out.usable_in_place();
    const long together = in_place || !out.whole_rows() ? 1 : rows_together(width);
    const bool far = outputs_are_far(plan);
    RowsAhead ahead(plan, out, far ? out.bottom : 0, together, true);
    const float* map = w.map + (tile.y.begin - tile.y.from) * w.row_stride;
    if (in_place) {
        const long stride = out.images.channels;
        for (long i = out.top; i < out.bottom; i++, map += w.row_stride) {
            float* row = out.row_in_place(i);
            rows.inverse_real(map, row - first * stride, stride, first, count, w.fft, ahead.from(i + 1));
            if (relu) relu_in_place(row, stride, width);
        }
        return;
    }
    for (long i = out.top; i < out.bottom; i += together) {
        const long number = std::min(together, out.bottom - i);
        Ahead* same = ahead.from(i);  // scatter comes afterwards, and need not ask
        for (long r = 0; r < number; r++, map += w.row_stride)
            rows.inverse_real(map, w.line + r * width * PAIR, PAIR, first, count, w.fft, same);
        scatter(out.images, out.image, out.channel, i * out.images.width + out.left, number * width, GROUP,
                w.line + first * PAIR, nullptr, relu, false);
    }
}

// Columns of a map, [coefficient]. Those of packed numbers are two real sequences, one of each block.
void column_forward(const Transform& t, long column, const float* map, int count, float* out,
                    const Workspace& w) {
    if (column < PACKED) t.forward_real(map + column * PAIR, w.row_stride, count, out, w.fft, nullptr);
    else t.forward(map + column * PAIR, w.row_stride, count, out, w.fft);
}
void column_inverse(const Transform& t, long column, const float* in, float* map, int count,
                    const Workspace& w) {
    if (column < PACKED) t.inverse_real(in, map + column * PAIR, w.row_stride, 0, count, w.fft, nullptr);
    else t.inverse(in, map + column * PAIR, w.row_stride, count, w.fft);
}
// Whether coefficient i of a column is two real numbers, one of each block, which were not doubled.
INLINE bool is_packed(long column, long i) { return column < PACKED && i < PACKED; }
// The spectrum of a group's kernels, [column][coefficient].
void group_spectrum(const Plan& plan, const Images& weight, long channel, float* spectrum,
                    const Workspace& w) {
    const Transform &rows = *plan.row_transform, &columns = *plan.column_transform;
    const Axis &down = plan.cropped.vertical, &across = plan.cropped.horizontal;
    const Vec scale = scale_of((long)rows.size * columns.size);
    gather_kernel(plan, weight, channel, GROUP, w.kernel);
    std::fill_n(w.map.data, w.map.size, 0.f);
    std::fill_n(w.line.data, rows.size * PAIR, 0.f);
    for (long i = 0; i < down.taps; i++) {
        for (long j = 0; j < across.taps; j++)
            store(w.line + tap_place(across, j, rows.size) * PAIR,
                  scaled(load_complex(w.kernel + (i * across.taps + j) * PAIR), scale));
        float* row = w.map + tap_place(down, i, columns.size) * w.row_stride;
        rows.forward_real(w.line, PAIR, rows.size, row, w.fft, nullptr);
    }
    for (long column = 0; column < rows.size; column++)
        column_forward(columns, column, w.map, columns.size, spectrum + column * columns.size * PAIR, w);
}

const float* own_spectrum(const Plan& plan, const Images& weight, long channel, const Workspace& w) {
    group_spectrum(plan, weight, channel, w.spectrum, w);
    return w.spectrum;
}

// Columns of a tile: transformed, multiplied by the weights' spectrum, transformed back in place.
void multiply_columns(const Plan& plan, const Tile& tile, const float* spectrum, const float* bias,
                      const Workspace& w) {
    const Transform& columns = *plan.column_transform;
    const int count = tile.y.to - tile.y.from, wanted = tile.y.end - tile.y.from;
    for (long column = 0; column < plan.row_transform->size; column++, spectrum += columns.size * PAIR) {
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
    // a constant is the frequency 0, which is the first of a row
    for (float* row = w.map; row < w.map + wanted * w.row_stride; row += w.row_stride)
        store(row, load_complex(row) + load_complex(bias));
}

// The same with the gradient of y in w.map and x in w.second_map: leaves the gradient of x in w.map where
// WANT_X, and where WANT_WEIGHT adds what the tile contributes to the spectrum of the weight gradient; the
// `first` one is not added, but written.
template <bool WANT_X, bool WANT_WEIGHT>
void gradient_columns(const Plan& plan, const Tile& tile, const float* spectrum, float* sums, bool first,
                      const Workspace& w) {
    const Transform& columns = *plan.column_transform;
    const int count = tile.y.to - tile.y.from, wanted = tile.y.end - tile.y.from;
    for (long column = 0; column < plan.row_transform->size; column++) {
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
                store(sums + place,
                      (first ? Complex{} : load_complex(sums + place)) + times(w.second_column + i * PAIR));
            if (WANT_X) store(w.column + i * PAIR, times(spectrum + place));
        }
        if (WANT_X) column_inverse(columns, column, w.column, w.map, wanted, w);
    }
}

// From the summed spectrum to the weight gradient of a group.
void weight_gradient(const Plan& plan, const float* sums, const Images& grad_weight, long channel,
                     const Workspace& w) {
    const Transform &rows = *plan.row_transform, &columns = *plan.column_transform;
    const Axis &down = plan.cropped.vertical, &across = plan.cropped.horizontal;
    const Vec scale = scale_of((long)rows.size * columns.size);
    for (long column = 0; column < rows.size; column++)
        column_inverse(columns, column, sums + column * columns.size * PAIR, w.map, columns.size, w);
    for (long i = 0; i < down.taps; i++) {
        const float* row = w.map + tap_place(down, i, columns.size) * w.row_stride;
        rows.inverse_real(row, w.line, PAIR, 0, rows.size, w.fft, nullptr);
        for (long j = 0; j < across.taps; j++)
            store(w.kernel + (i * across.taps + j) * PAIR,
                  scaled(load_complex(w.line + tap_place(across, j, rows.size) * PAIR), scale));
    }
    scatter_kernel(plan, grad_weight, channel, GROUP, w.kernel);
}

}  // namespace

void fft_spectra(const Plan& plan, const Images& weight, float* spectra, long begin, long end) {
    const Workspace w = make_workspace(plan);
    for (long group = begin; group < end; group++)
        group_spectrum(plan, weight, group * PAIR, spectra + group * plan.spectrum_size(), w);
}

void fft_convolve(const Plan& plan, const Images& x, const Images& weight, const Spectra& spectra,
                 const float* bias, bool relu, const Images& y, long begin, long end) {
    const Workspace w = make_workspace(plan);
    GroupSpectrum spectrum{plan, weight, spectra};
    const long tasks = plan.images * plan.tiles();  // of a group
    for (long task = begin; task < end; task++) {
        const long group = task / tasks, channel = group * PAIR;
        const float* factors = spectrum.of(group, w);
        float group_bias[PAIR] = {};
        if (bias) std::copy_n(bias + channel, std::min<long>(PAIR, plan.channels - channel), group_bias);
        const Tile tile = tile_of(plan, task % tasks);
        rows_forward(plan, tile.inputs(x, channel), 0, w.map, w);
        multiply_columns(plan, tile, factors, bias ? group_bias : nullptr, w);
        rows_inverse(plan, tile, tile.outputs(y, channel), relu, w);
    }
}

void fft_backward(const Plan& plan, const Images& grad_y, const Images& x, const Images& weight,
                  const Spectra& spectra, const Images& grad_x, float* grad_weight, long parts, long begin,
                  long end) {
    const long most_tiles = ((plan.images - 1) / parts + 1) * plan.tiles();  // of a part
    const Workspace w = make_workspace(plan, grad_weight ? (most_tiles - 1) / TILES_IN_CHAIN + 1 : 0);
    GroupSpectrum spectrum{plan, weight, spectra};
    for (long task = begin; task < end; task++) {
        const long group = task / parts, part = task % parts, channel = group * PAIR;
        const float* factors = grad_x.data ? spectrum.of(group, w) : nullptr;
        const long first = plan.images * part / parts * plan.tiles();
        const long last = plan.images * (part + 1) / parts * plan.tiles();
        PairwiseSum sums(w.sums, plan.spectrum_size());
        for (long i = first; i < last; i++) {
            const Tile tile = tile_of(plan, i);
            const bool begins_chain = (i - first) % TILES_IN_CHAIN == 0;
            const bool ends_chain = (i + 1 - first) % TILES_IN_CHAIN == 0 || i + 1 == last;
            rows_forward(plan, tile.inputs(grad_y, channel), 0, w.map, w);
            if (grad_weight) {  // x without the overlap, at the same place: each of its pixels counts once
                const long above = (tile.y.begin - tile.y.from) * w.row_stride;
                std::fill_n(w.second_map.data, above, 0.f);
                const long offset = tile.x.begin - tile.x.from;
                rows_forward(plan, tile.outputs(x, channel), offset, w.second_map + above, w);
            }
            if (!grad_weight) gradient_columns<true, false>(plan, tile, factors, nullptr, false, w);
            else if (!grad_x.data)
                gradient_columns<false, true>(plan, tile, nullptr, sums.term(), begins_chain, w);
            else gradient_columns<true, true>(plan, tile, factors, sums.term(), begins_chain, w);
            if (grad_weight && ends_chain) sums.add();
            if (grad_x.data) rows_inverse(plan, tile, tile.outputs(grad_x, channel), false, w);
        }
        if (grad_weight) {
            weight_gradient(plan, sums.total(), weight_gradient_of(plan, grad_weight, part), channel, w);
        }
    }
}
