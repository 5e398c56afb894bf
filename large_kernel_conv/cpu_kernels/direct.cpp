// The convolution as it is written down, over the taps that do not lie in the padding. For small kernels and
// small maps.
#include <algorithm>

#include "correlate.h"
#include "layout.h"
#include "memory.h"
#include "methods.h"
#include "simd.h"
#include "sums.h"

namespace {

// What a dilated kernel does is done by as many kernels without dilation as it has steps in each direction:
// the outputs begin + phase, begin + phase + dilation, ... of a span, from the inputs that lie as far apart.
struct Phase {
    long first_input, inputs;  // from `from` on
    long first_output, outputs;
    long padding;
    Phase(const Axis& axis, const Span& s, long phase) : first_output(phase) {
        if (axis.dilation == 1) {  // divisions take long
            first_input = 0, padding = axis.padding - s.begin + s.from;
            inputs = s.to - s.from, outputs = s.end - s.begin;
            return;
        }
        const long step = axis.dilation, first = s.begin + phase - axis.padding - s.from;  // of the first tap
        first_input = (first % step + step) % step, padding = (first_input - first) / step;
        inputs = (s.to - s.from - first_input + step - 1) / step;
        outputs = (s.end - s.begin - phase + step - 1) / step;
    }
};

// Some pixels of one block of channels, `row` floats from row to row.
struct Pixels {
    float* first;
    long row, pixel;
    // of one phase in each direction
    Rows phase(const Geometry& g, long i, long rows, long j, long columns) const {
        return {first + i * row + j * pixel, rows, columns, g.vertical.dilation * row,
                g.horizontal.dilation * pixel};
    }
};

// Floats of a kernel, or of what takes its place, with the rows of zeros before and after it.
long kernel_floats(long height, long width, long dilation) {
    return (height + 2 * (ROWS - 1) * dilation) * width * LANES;
}

// How the work is cut into pieces whose data fit the cache.
struct Pieces {
    long groups;         // computed together: at most MOST_BLOCKS
    long rows;           // of outputs in a band
    long input, output;  // floats of one group's band
    long taps;           // floats of one group's kernel, with rows of zeros

    // `whole_maps`: several groups only where a band can be a whole map.
    Pieces(const Plan& plan, bool channels_last, bool whole_maps) {
        constexpr long CACHE = 256 * 1024;
        const Axis &vertical = plan.tiled.vertical, &horizontal = plan.tiled.horizontal;
        auto fitting = [&] { return CACHE / (horizontal.inputs * groups * LANES * 4) - vertical.reach(); };
        // where channels lie together, a group alone takes too small a part of each pixel, and pixels may lie
        // on as many pages
        groups = channels_last ? MOST_BLOCKS : 1;
        if (whole_maps && fitting() < vertical.outputs) groups = 1;
        rows = std::min(vertical.outputs, std::max(fitting(), 4L * ROWS));
        input = std::min(vertical.inputs, rows + vertical.reach()) * horizontal.inputs * LANES;
        output = rows * horizontal.outputs * LANES;
        taps = kernel_floats(vertical.taps, horizontal.taps, 1);
    }
};

// Calls visit(part, channel, together) for the groups of the tasks `begin` ... `end` that are computed
// together.
template <class F>
void for_groups(const Plan& plan, const Pieces& p, long begin, long end, F visit) {
    const long groups = plan.channel_groups();
    for (long task = begin, together; task < end; task += together) {
        together = std::min({p.groups, end - task, groups - task % groups});  // of one part of the images
        visit(task / groups, task % groups * LANES, together);
    }
}

// Bands of a part of the images, at most.
long bands_in_part(const Plan& plan, const Pieces& p, long parts) {
    return ((plan.images - 1) / parts + 1) * ((plan.tiled.vertical.outputs - 1) / p.rows + 1);
}

// Calls visit(image, span) for each band of each image of a part: the rows of outputs, and those of inputs
// that they need.
template <class F>
void for_bands(const Plan& plan, const Pieces& p, long part, long parts, F visit) {
    for (long image = plan.images * part / parts; image < plan.images * (part + 1) / parts; image++)
        for (long begin = 0, end = plan.tiled.vertical.outputs; begin < end; begin += p.rows)
            visit(image, span(plan.tiled.vertical, begin, std::min(end, begin + p.rows)));
}

// Calls visit(down, across) for each pair of phases of a band.
template <class F>
void for_phases(const Geometry& g, const Span& s, F visit) {
    const Span whole = span(g.horizontal, 0, g.horizontal.outputs);
    for (long a = 0; a < std::min(g.vertical.dilation, s.end - s.begin); a++)
        for (long b = 0; b < std::min(g.horizontal.dilation, g.horizontal.outputs); b++)
            visit(Phase(g.vertical, s, a), Phase(g.horizontal, whole, b));
}

// The outputs of a band, of one block, from its inputs.
void correlate_band(const Geometry& g, Span s, const Pixels& in, float* kernel, const Pixels& out,
                    const Finish* finish) {
    const long width = g.horizontal.taps;
    for_phases(g, s, [&](const Phase& down, const Phase& across) {
        correlate({.in = in.phase(g, down.first_input, down.inputs, across.first_input, across.inputs),
                   .kernel = {kernel, g.vertical.taps, width, width * LANES, LANES},
                   .padding_top = down.padding, .padding_left = across.padding,
                   .out = out.phase(g, down.first_output, down.outputs, across.first_output, across.outputs),
                   .zero_rows = true, .finish = finish});
    });
}

// What a band adds to the weight gradient of one block, in reverse, one term for each pair of phases: x, the
// outputs of the band, takes the kernel's place.
void correlate_with_band(const Geometry& g, Span s, const Pixels& in, const Pixels& x, bool zero_rows,
                         PairwiseSum& sums) {
    const long height = g.vertical.taps, width = g.horizontal.taps;
    for_phases(g, s, [&](const Phase& down, const Phase& across) {
        // the taps that meet an output of this phase; in small maps not all of them do
        const long first = std::max(0L, across.padding - across.outputs + 1);
        const long last = std::min(width, across.padding + across.inputs);
        if (first > 0 || last < width) std::fill_n(sums.term(), height * width * LANES, 0.f);
        correlate({.in = in.phase(g, down.first_input, down.inputs, across.first_input, across.inputs),
                   .kernel = x.phase(g, down.first_output, down.outputs, across.first_output, across.outputs),
                   .padding_top = down.padding, .padding_left = across.padding - first,
                   .out = {sums.term() + first * LANES, height, std::max(0L, last - first), width * LANES,
                           LANES},
                   .zero_rows = zero_rows});
        sums.add();
    });
}

// Leaves room for, and writes, the rows of zeros before and after those of each group's kernel, `size` floats
// apart; returns where the first group's other rows begin.
float* with_zero_rows(float* memory, long height, long width, long dilation, long groups, long size) {
    const long zeros = (ROWS - 1) * dilation * width * LANES;
    for (float* kernel = memory; kernel < memory + groups * size; kernel += size) {
        std::fill_n(kernel, zeros, 0.f);
        std::fill_n(kernel + zeros + height * width * LANES, zeros, 0.f);
    }
    return memory + zeros;
}

void reverse_taps(float* kernel, long taps) {
    for (long a = 0, b = taps - 1; a < b; a++, b--) {
        Vec first = load(kernel + a * LANES);
        store(kernel + a * LANES, load(kernel + b * LANES)), store(kernel + b * LANES, first);
    }
}

// Where the vectors of some groups lie whose memory begins `size` floats apart.
Blocks apart(long groups, long size) {
    return {.number = groups, .pixel_stride = LANES, .block_stride = size};
}

}  // namespace

// Some rows of an image, of some adjacent blocks of channels.
struct Band {
    const Images& images;
    long image, channel, blocks, from, to;

    // Whether all blocks are whole, and so can be used where they are. Pixels further apart, on as many pages,
    // are better gathered once than looked for at each tap.
    bool usable_in_place() const {
        return images.channels_last && images.type == Type::float32 && images.channels <= 128 &&
               channel + blocks * LANES <= images.channels;
    }
    long pixels() const { return (to - from) * images.width; }
    Pixels in_place(long block) const {
        const long first = (image * images.height + from) * images.width, pixel = images.channels;
        return {(float*)images.data + first * pixel + channel + block * LANES, images.width * pixel, pixel};
    }
    // Of the blocks whose memory begins `size` floats apart.
    Pixels in_memory(float* memory, long size, long block) const {
        return {memory + block * size, images.width * LANES, LANES};
    }
    void load(float* memory, long size) const {
        gather(images, image, channel, from * images.width, pixels(), apart(blocks, size), memory);
    }
};

void direct_convolve(const Plan& plan, const Images& x, const Images& weight, const float* bias, bool relu,
                     const Images& y, long parts, long begin, long end) {
    const Geometry& g = plan.tiled;
    const Pieces p(plan, y.channels_last, false);
    const bool far = outputs_are_far(plan);
    Buffer taps{p.groups * p.taps}, in{p.groups * p.input}, out{p.groups * p.output};
    thread_arena().place({&taps, &in, &out});
    float* kernel = with_zero_rows(taps, g.vertical.taps, g.horizontal.taps, 1, p.groups, p.taps);
    for_groups(plan, p, begin, end, [&](long part, long channel, long together) {
        gather_kernel(plan, weight, channel, apart(together, p.taps), kernel);
        for_bands(plan, p, part, parts, [&](long image, Span s) {
            const Band inputs{x, image, channel, together, s.from, s.to};
            const Band outputs{y, image, channel, together, s.begin, s.end};
            const bool in_place = inputs.usable_in_place() && outputs.usable_in_place();
            if (!in_place) inputs.load(in, p.input);
            for (long i = 0; i < together; i++) {
                const Finish finish{bias && in_place ? load(bias + channel + i * LANES) : Vec{}, relu};
                correlate_band(g, s, in_place ? inputs.in_place(i) : inputs.in_memory(in, p.input, i),
                               kernel + i * p.taps,
                               in_place ? outputs.in_place(i) : outputs.in_memory(out, p.output, i),
                               in_place && (bias || relu) ? &finish : nullptr);
            }
            if (!in_place)
                scatter(y, image, channel, s.begin * y.width, outputs.pixels(), apart(together, p.output),
                        out, bias ? bias + channel : nullptr, relu, far);
        });
    });
}

void direct_backward(const Plan& plan, const Images& grad_y, const Images& x, const Images& weight,
                     const Images& grad_x, float* grad_weight, long parts, long begin, long end) {
    const Geometry& g = plan.tiled;  // in reverse: from grad_y to grad_x
    const long dilation = g.vertical.dilation, phases = dilation * g.horizontal.dilation;
    const bool far = outputs_are_far(plan);
    // `true`: narrow bands, a weight gradient each, would cost more than groups gain
    const Pieces p(plan, x.channels_last, true);
    const long band = kernel_floats(p.rows, x.width, dilation);  // floats of one block's x
    const long slots = grad_weight ? PairwiseSum::slots(bands_in_part(plan, p, parts) * phases) : 0;
    const long sum = g.taps() * LANES, sums_size = slots * sum;
    Buffer taps{p.groups * p.taps}, in{p.groups * p.input}, out{p.groups * p.output};
    Buffer bands{p.groups * band}, all_sums{p.groups * sums_size};
    thread_arena().place({&taps, &in, &out, &bands, &all_sums});
    float* kernel = with_zero_rows(taps, g.vertical.taps, g.horizontal.taps, 1, p.groups, p.taps);
    for_groups(plan, p, begin, end, [&](long part, long channel, long together) {
        gather_kernel(plan, weight, channel, apart(together, p.taps), kernel);
        // the gradient of a correlation is a correlation with the reversed kernel
        for (long i = 0; i < together; i++) reverse_taps(kernel + i * p.taps, g.taps());
        PairwiseSum sums[MOST_BLOCKS];  // over the bands, of each block
        for (long i = 0; i < together; i++) sums[i] = {all_sums + i * sums_size, sum};
        for_bands(plan, p, part, parts, [&](long image, Span s) {
            const Band grads{grad_y, image, channel, together, s.from, s.to};
            const Band xs{x, image, channel, together, s.begin, s.end};
            const bool in_place = grads.usable_in_place() && xs.usable_in_place();
            if (!in_place) grads.load(in, p.input);
            auto grads_of = [&](long i) {
                return in_place ? grads.in_place(i) : grads.in_memory(in, p.input, i);
            };
            if (grad_x.data) {
                const Band outputs{grad_x, image, channel, together, s.begin, s.end};
                for (long i = 0; i < together; i++)
                    correlate_band(g, s, grads_of(i), kernel + i * p.taps,
                                   in_place ? outputs.in_place(i) : outputs.in_memory(out, p.output, i),
                                   nullptr);
                if (!in_place)
                    scatter(grad_x, image, channel, s.begin * x.width, xs.pixels(), apart(together, p.output),
                            out, nullptr, false, far);
            }
            if (!grad_weight) return;
            float* rows = bands;
            if (!in_place) {
                rows = with_zero_rows(bands, s.end - s.begin, x.width, dilation, together, band);
                xs.load(rows, band);
            }
            for (long i = 0; i < together; i++)
                correlate_with_band(g, s, grads_of(i),
                                    in_place ? xs.in_place(i) : xs.in_memory(rows, band, i), !in_place,
                                    sums[i]);
        });
        if (!grad_weight) return;
        for (long i = 0; i < together; i++) reverse_taps(sums[i].total(), g.taps());
        scatter_kernel(plan, weight_gradient_of(plan, grad_weight, part), channel, apart(together, sums_size),
                       all_sums);
    });
}
