// The convolution with kernels of one row or of one column, as products of Fourier transforms along that row
// or column: fft_conv.cpp with the transforms of one axis left out.
#include <algorithm>

#include "fft.h"
#include "layout.h"
#include "memory.h"
#include "methods.h"
#include "simd.h"
#include "spectra.h"
#include "sums.h"
#include "tile.h"

namespace {

// Lines whose spectra are added up one by one for the weight gradient. Such sums are added in pairs, in
// passes of their own.
constexpr long LINES_IN_CHAIN = 32;

bool are_rows(const Plan& plan) { return plan.row_transform; }
const Transform& transform_of(const Plan& plan) {
    return are_rows(plan) ? *plan.row_transform : *plan.column_transform;
}
const Axis& axis_of(const Plan& plan, const Geometry& g) { return are_rows(plan) ? g.horizontal : g.vertical; }
const Span& span_of(const Plan& plan, const Tile& tile) { return are_rows(plan) ? tile.x : tile.y; }
const Span& span_of_lines(const Plan& plan, const Tile& tile) { return are_rows(plan) ? tile.y : tile.x; }

// Intermediate results of one thread.
struct Workspace {
    Buffer in, second_in, out;            // pixels of a tile; second_*: of x, for the weight gradient
    Buffer spectrum, second_spectrum;     // of a line
    Buffer fft;                           // the transform's scratch
    Buffer kernel, group_spectrum, sums;  // of a group: weights, their spectrum, sums of their gradient's
};

// `terms`: of the sums; none where no weight gradient is wanted.
Workspace make_workspace(const Plan& plan, long terms = 0) {
    const long points = transform_of(plan).size;
    const long lines = are_rows(plan) ? plan.tile_height : plan.tile_width;
    Workspace w{
        .in = {lines * points * PAIR},
        .second_in = {terms ? lines * points * PAIR : 0},
        .out = {lines * points * PAIR},
        .spectrum = {points * PAIR},
        .second_spectrum = {points * PAIR},
        .fft = {points * PAIR},
        .kernel = {plan.cropped.taps() * PAIR},
        .group_spectrum = {points * PAIR},
        .sums = {terms ? PairwiseSum::slots(terms) * points * PAIR : 0},
    };
    thread_arena().place({&w.in, &w.second_in, &w.out, &w.spectrum, &w.second_spectrum, &w.fft, &w.kernel,
                          &w.group_spectrum, &w.sums});
    return w;
}

// Sequences of pixels: how many floats lie from one pixel to the next, and from a sequence to the next.
struct Lines {
    float* first;
    long pixel, line;
    float* operator[](long i) const { return first + i * line; }
};

// Those of a window whose pixels and rows lie so far apart.
Lines lines_of(const Plan& plan, float* first, long pixel, long row) {
    return are_rows(plan) ? Lines{first, pixel, row} : Lines{first, row, pixel};
}

Lines in_place(const Plan& plan, const Window& window) {
    const long pixel = window.images.channels;
    return lines_of(plan, window.row_in_place(window.top), pixel, window.images.width * pixel);
}

// The pixels of a window, with `zeros` before the first of each line.
Lines loaded(const Plan& plan, const Window& in, long zeros, float* memory) {
    if (!zeros && in.usable_in_place()) return in_place(plan, in);
    const long above = are_rows(plan) ? 0 : zeros, left = are_rows(plan) ? zeros : 0;
    const long width = left + in.width();
    std::fill_n(memory, above * width * PAIR, 0.f);
    const long together = in.whole_rows() && !left ? in.height() : 1;
    float* row = memory + above * width * PAIR;
    for (long i = in.top; i < in.bottom; i += together, row += together * width * PAIR) {
        std::fill_n(row, left * PAIR, 0.f);
        gather(in.images, in.image, in.channel, i * in.images.width + in.left, together * in.width(), GROUP,
               row + left * PAIR);
    }
    return lines_of(plan, memory, PAIR, width * PAIR);
}

// Where the pixels of a window are to be written; stored() then brings them there.
Lines place_for(const Plan& plan, const Window& out, float* memory) {
    if (out.usable_in_place()) return in_place(plan, out);
    return lines_of(plan, memory, PAIR, out.width() * PAIR);
}

void stored(const Window& out, bool relu, const float* memory) {
    if (out.usable_in_place()) {
        for (long i = out.top; relu && i < out.bottom; i++)
            relu_in_place(out.row_in_place(i), out.images.channels, out.width());
        return;
    }
    const long together = out.whole_rows() ? out.height() : 1;
    for (long i = out.top; i < out.bottom; i += together, memory += together * out.width() * PAIR)
        scatter(out.images, out.image, out.channel, i * out.images.width + out.left, together * out.width(),
                GROUP, memory, nullptr, relu, false);
}

void group_spectrum(const Plan& plan, const Images& weight, long channel, float* spectrum,
                    const Workspace& w) {
    const Transform& t = transform_of(plan);
    const Axis& axis = axis_of(plan, plan.cropped);
    const Vec scale = scale_of(t.size);
    gather_kernel(plan, weight, channel, GROUP, w.kernel);
    std::fill_n(w.in.data, t.size * PAIR, 0.f);
    for (long i = 0; i < axis.taps; i++)
        store(w.in + tap_place(axis, i, t.size) * PAIR, scaled(load_complex(w.kernel + i * PAIR), scale));
    t.forward_real(w.in, PAIR, t.size, spectrum, w.fft, nullptr);
}

const float* own_spectrum(const Plan& plan, const Images& weight, long channel, const Workspace& w) {
    group_spectrum(plan, weight, channel, w.group_spectrum, w);
    return w.group_spectrum;
}

void weight_gradient(const Plan& plan, const float* sums, const Images& grad_weight, long channel,
                     const Workspace& w) {
    const Transform& t = transform_of(plan);
    const Axis& axis = axis_of(plan, plan.cropped);
    const Vec scale = scale_of(t.size);
    t.inverse_real(sums, w.in, PAIR, 0, t.size, w.fft, nullptr);
    for (long i = 0; i < axis.taps; i++)
        store(w.kernel + i * PAIR, scaled(load_complex(w.in + tap_place(axis, i, t.size) * PAIR), scale));
    scatter_kernel(plan, grad_weight, channel, GROUP, w.kernel);
}

// A line's spectrum times another one, or its conjugate.
template <bool CONJUGATE>
INLINE Complex product_at(long i, const float* line, const float* other) {
    const Complex a = load_complex(line + i * PAIR), b = load_complex(other + i * PAIR);
    if (i < PACKED) return product_of_packed(a, b);
    return CONJUGATE ? product_conjugate(a, b) : product(a, b);
}

}  // namespace

void line_spectra(const Plan& plan, const Images& weight, float* spectra, long begin, long end) {
    const Workspace w = make_workspace(plan);
    for (long group = begin; group < end; group++)
        group_spectrum(plan, weight, group * PAIR, spectra + group * plan.spectrum_size(), w);
}

void line_convolve(const Plan& plan, const Images& x, const Images& weight, const Spectra& spectra,
                   const float* bias, bool relu, const Images& y, long begin, long end) {
    const Workspace w = make_workspace(plan);
    const Transform& t = transform_of(plan);
    GroupSpectrum spectrum{plan, weight, spectra};
    const long tasks = plan.images * plan.tiles();  // of a group
    for (long task = begin; task < end; task++) {
        const long group = task / tasks, channel = group * PAIR;
        const float* factors = spectrum.of(group, w);
        float group_bias[PAIR] = {};
        if (bias) std::copy_n(bias + channel, std::min<long>(PAIR, plan.channels - channel), group_bias);
        const Complex constant = load_complex(group_bias);
        const Tile tile = tile_of(plan, task % tasks);
        const Span along = span_of(plan, tile), lines = span_of_lines(plan, tile);
        const long first = along.begin - along.from, last = along.end - along.from;
        const Lines in = loaded(plan, tile.inputs(x, channel), 0, w.in);
        const Window window = tile.outputs(y, channel);
        const Lines out = place_for(plan, window, w.out);
        for (long l = 0; l < lines.end - lines.begin; l++) {
            t.forward_real(in[l], in.pixel, along.to - along.from, w.spectrum, w.fft, nullptr);
            for (long i = 0; i < t.size; i++)
                store(w.spectrum + i * PAIR, product_at<false>(i, w.spectrum, factors));
            // a constant is the frequency 0
            store(w.spectrum, load_complex(w.spectrum) + constant);
            t.inverse_real(w.spectrum, out[l] - first * out.pixel, out.pixel, first, last, w.fft, nullptr);
        }
        stored(window, relu, w.out);
    }
}

void line_backward(const Plan& plan, const Images& grad_y, const Images& x, const Images& weight,
                   const Spectra& spectra, const Images& grad_x, float* grad_weight, long parts, long begin,
                   long end) {
    const long lines_of_tile = are_rows(plan) ? plan.tile_height : plan.tile_width;
    const long most_lines = ((plan.images - 1) / parts + 1) * plan.tiles() * lines_of_tile;  // of a part
    const Workspace w = make_workspace(plan, grad_weight ? (most_lines - 1) / LINES_IN_CHAIN + 1 : 0);
    const Transform& t = transform_of(plan);
    GroupSpectrum spectrum{plan, weight, spectra};
    for (long task = begin; task < end; task++) {
        const long group = task / parts, part = task % parts, channel = group * PAIR;
        const float* factors = grad_x.data ? spectrum.of(group, w) : nullptr;
        PairwiseSum sums(w.sums, plan.spectrum_size());
        long in_chain = 0;
        for (long i = plan.images * part / parts * plan.tiles();
             i < plan.images * (part + 1) / parts * plan.tiles(); i++) {
            const Tile tile = tile_of(plan, i);
            const Span along = span_of(plan, tile), lines = span_of_lines(plan, tile);
            const long first = along.begin - along.from, last = along.end - along.from;
            const Lines in = loaded(plan, tile.inputs(grad_y, channel), 0, w.in);
            // x without the overlap, at the same place: each of its pixels counts once
            Lines x_in{};
            if (grad_weight) x_in = loaded(plan, tile.outputs(x, channel), first, w.second_in);
            const Window window = tile.outputs(grad_x, channel);
            Lines out{};
            if (grad_x.data) out = place_for(plan, window, w.out);
            for (long l = 0; l < lines.end - lines.begin; l++) {
                t.forward_real(in[l], in.pixel, along.to - along.from, w.spectrum, w.fft, nullptr);
                if (grad_weight) {
                    t.forward_real(x_in[l], x_in.pixel, last, w.second_spectrum, w.fft, nullptr);
                    float* sum = sums.term();
                    for (long j = 0; j < t.size; j++, sum += PAIR)
                        store(sum, (in_chain ? load_complex(sum) : Complex{}) +
                                       product_at<true>(j, w.spectrum, w.second_spectrum));
                    if (++in_chain == LINES_IN_CHAIN) sums.add(), in_chain = 0;
                }
                if (!grad_x.data) continue;
                for (long j = 0; j < t.size; j++)
                    store(w.spectrum + j * PAIR, product_at<true>(j, w.spectrum, factors));
                t.inverse_real(w.spectrum, out[l] - first * out.pixel, out.pixel, first, last, w.fft, nullptr);
            }
            if (grad_x.data) stored(window, false, w.out);
        }
        if (!grad_weight) continue;
        if (in_chain) sums.add();
        weight_gradient(plan, sums.total(), weight_gradient_of(plan, grad_weight, part), channel, w);
    }
}
