// The convolution as it is written down, over the taps that do not lie in the padding. For small kernels and
// small maps.
#include <algorithm>

#include "kernels.h"
#include "layout.h"
#include "memory.h"
#include "simd.h"
#include "sums.h"

namespace {

// Outputs that one call keeps in registers: at most ROWS x COLUMNS accumulators.
constexpr int ROWS = LANES == 8 ? 2 : 3;
constexpr int COLUMNS = LANES == 8 ? 6 : 8;

// A sum loses accuracy with the number of terms that are added one by one. One of more than PRODUCTS_IN_CHAIN
// products is therefore made of chains of about as many; CHAINS_IN_TERM of those are added up in the same
// way, and such sums in pairs.
constexpr long PRODUCTS_IN_CHAIN = 128, CHAINS_IN_TERM = 32;

// Of one block of channels: each pixel and each tap is a vector. `kernel` has ROWS - 1 rows of zeros before
// its first row and after its last one, for patches of more than two rows of outputs.
struct Correlation {
    const float* in;
    long in_height, in_width;
    const float* kernel;
    Geometry geometry;
    float* out;
    long out_height, out_width;
};

// Adds one tap of each of the rows TOP ... BOTTOM to the columns FROM ... TO of the accumulators.
template <int TOP, int BOTTOM, int FROM, int TO, int R, int C>
INLINE void add_tap(Vec (&sum)[R][C], const float* in, const float* tap, long kernel_row) {
    Vec weight[R];
    UNROLL for (int r = TOP; r < BOTTOM; r++) weight[r] = in_register(load(tap - r * kernel_row));
    UNROLL for (int c = FROM; c < TO; c++) {
        Vec x = in_register(load(in + c * LANES));
        UNROLL for (int r = TOP; r < BOTTOM; r++) sum[r][c] += x * weight[r];
    }
}

// The taps that reach only the last C - CUT columns (the others lie left of the map), for CUT <= cut.
template <int TOP, int BOTTOM, int CUT, int R, int C>
INLINE void add_left_taps(Vec (&sum)[R][C], long cut, const float* in, const float* tap, long kernel_row) {
    if constexpr (CUT > 0) {
        if (CUT <= cut) add_tap<TOP, BOTTOM, CUT, C>(sum, in - CUT * LANES, tap - CUT * LANES, kernel_row);
        add_left_taps<TOP, BOTTOM, CUT - 1>(sum, cut, in, tap, kernel_row);
    }
}

// The taps that reach only the first REACHED columns, for REACHED >= reached.
template <int TOP, int BOTTOM, int REACHED, int R, int C>
INLINE void add_right_taps(Vec (&sum)[R][C], long reached, const float* in, const float* tap,
                           long kernel_row) {
    if constexpr (REACHED > 0) {
        if (REACHED >= reached)
            add_tap<TOP, BOTTOM, 0, REACHED>(sum, in - REACHED * LANES, tap - REACHED * LANES, kernel_row);
        add_right_taps<TOP, BOTTOM, REACHED - 1>(sum, reached, in, tap, kernel_row);
    }
}

// The chains that ended, of R x C accumulators.
template <int R, int C>
class Chains {
  public:
    Chains() { std::fill_n(sums.term(), R * C * LANES, 0.f); }
    // `products`: that a row of the input gives each accumulator, at most.
    INLINE void end_row(Vec (&sum)[R][C], long products) {
        length += products;
        if (length + products > PRODUCTS_IN_CHAIN) end_chain(sum);
    }
    INLINE void end_chain(Vec (&sum)[R][C]) {
        float* chains = sums.term();
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int c = 0; c < C; c++, chains += LANES)
                store(chains, load(chains) + sum[r][c]), sum[r][c] = Vec{};
        length = 0;
        if (++number % CHAINS_IN_TERM) return;
        sums.add();
        std::fill_n(sums.term(), R * C * LANES, 0.f);
    }
    INLINE void total(Vec (&sum)[R][C]) {
        end_chain(sum), sums.add();
        const float* total = sums.total();
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int c = 0; c < C; c++, total += LANES) sum[r][c] = load(total);
    }

  private:
    static constexpr long MOST_PRODUCTS = 1L << 32;  // of a band: inputs for more would take 64 GiB
    static constexpr int SLOTS = PairwiseSum::slots(MOST_PRODUCTS / CHAINS_IN_TERM / PRODUCTS_IN_CHAIN);
    alignas(Vec) float memory[SLOTS * R * C * LANES];
    PairwiseSum sums{memory, R * C * LANES};
    long length = 0, number = 0;
};

// A patch of R x C outputs from (row, column) on; C <= in_width. LONG: of more than PRODUCTS_IN_CHAIN
// products each.
template <bool LONG, int R, int C>
void correlate_patch(const Correlation& t, long row, long column) {
    Vec sum[R][C] = {};
    std::conditional_t<LONG, Chains<R, C>, int> chains;
    const Geometry& g = t.geometry;
    const long kernel_row = g.kernel_width * LANES;
    const long top = row - g.padding_top;  // the input row that meets the first taps of output row `row`
    const long from = std::max(0L, top), to = std::min(t.in_height, top + R - 1 + g.kernel_height);
    // at output `column`: the tap that meets input column 0, one past that which meets the last input column
    const long left = g.padding_left - column, right = left + t.in_width;
    // taps that reach all C columns
    const long first = std::max(0L, left), last = std::min(g.kernel_width, right - C + 1);
    const long cut = std::min<long>(C - 1, left), reached = std::max(1L, right - g.kernel_width + 1);
    // input row i, of which output rows TOP ... BOTTOM meet taps
    auto add_row = [&]<int TOP, int BOTTOM>(long i, std::integer_sequence<int, TOP, BOTTOM>)
                       __attribute__((always_inline)) {
        const float* in = t.in + i * t.in_width * LANES;
        // those of output row `row`; those of row + r lie r rows before
        const float* taps = t.kernel + (i - top) * kernel_row;
        add_left_taps<TOP, BOTTOM, C - 1>(sum, cut, in, taps + left * LANES, kernel_row);
        long k = first;
        do {
            const long end = LONG ? std::min(last, k + PRODUCTS_IN_CHAIN) : last;
            for (; k < end; k++)
                add_tap<TOP, BOTTOM, 0, C>(sum, in + (k - left) * LANES, taps + k * LANES, kernel_row);
            if constexpr (LONG)
                if (k < last) chains.end_chain(sum);
        } while (LONG && k < last);
        add_right_taps<TOP, BOTTOM, C - 1>(sum, reached, in + t.in_width * LANES, taps + right * LANES,
                                           kernel_row);
        if constexpr (LONG) chains.end_row(sum, std::min(g.kernel_width, t.in_width));
    };
    const std::integer_sequence<int, 0, R> all;
    if constexpr (R == 2) {  // small kernels: rows of zeros would be a good part of them
        long i = from;
        if (i == top && i < to) add_row(i++, std::integer_sequence<int, 0, 1>());
        for (; i < std::min(to, top + g.kernel_height); i++) add_row(i, all);
        if (i < to) add_row(i, std::integer_sequence<int, 1, 2>());
    } else {
        for (long i = from; i < to; i++) add_row(i, all);
    }
    if constexpr (LONG) chains.total(sum);
    float* out = t.out + (row * t.out_width + column) * LANES;
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int c = 0; c < C; c++) store(out + (r * t.out_width + c) * LANES, sum[r][c]);
}

template <bool LONG, int R, int... C>
void correlate_rows(const Correlation& t, long row, std::integer_sequence<int, C...>) {
    using Patch = void (*)(const Correlation&, long row, long column);
    static constexpr Patch patches[] = {&correlate_patch<LONG, R, C + 1>...};
    const long widest = std::min<long>(COLUMNS, t.in_width), number = (t.out_width + widest - 1) / widest;
    for (long b = 0, column = 0; b < number; b++) {
        long columns = (t.out_width - column) / (number - b);  // nearly equal patches
        patches[columns - 1](t, row, column);
        column += columns;
    }
}

template <bool LONG>
void correlate_all(const Correlation& t) {
    constexpr std::make_integer_sequence<int, COLUMNS> columns;
    long row = 0;
    // ROWS rows of outputs meet ROWS - 1 rows of zeros on either side of the kernel: too many for a small one
    if (t.geometry.kernel_height > 9)
        for (; row + ROWS <= t.out_height; row += ROWS) correlate_rows<LONG, ROWS>(t, row, columns);
    for (; row + 2 <= t.out_height; row += 2) correlate_rows<LONG, 2>(t, row, columns);
    if (row < t.out_height) correlate_rows<LONG, 1>(t, row, columns);
}

void correlate(const Correlation& t) {
    const Geometry& g = t.geometry;
    const long products = std::min(g.kernel_height, t.in_height) * std::min(g.kernel_width, t.in_width);
    products > PRODUCTS_IN_CHAIN ? correlate_all<true>(t) : correlate_all<false>(t);
}

long kernel_floats(long height, long width) { return (height + 2 * (ROWS - 1)) * width * LANES; }

// How the work is cut into pieces whose data fit the cache.
struct Pieces {
    long groups;         // computed together: at most MOST_BLOCKS
    long rows;           // of outputs in a band
    long input, output;  // floats of one group's band
    long taps;           // floats of one group's kernel, with rows of zeros

    // `whole_maps`: several groups only where a band can be a whole map.
    Pieces(const Plan& plan, bool channels_last, bool whole_maps) {
        constexpr long CACHE = 256 * 1024;
        const Geometry& g = plan.cropped;
        auto fitting = [&] { return CACHE / (plan.width * groups * LANES * 4) - g.kernel_height + 1; };
        // where channels lie together, a group alone takes too small a part of each pixel, and pixels may lie
        // on as many pages
        groups = channels_last ? MOST_BLOCKS : 1;
        if (whole_maps && fitting() < plan.height) groups = 1;
        rows = std::min(plan.height, std::max(fitting(), 4L * ROWS));
        input = std::min(plan.height, rows + g.kernel_height - 1) * plan.width * LANES;
        output = rows * plan.width * LANES;
        taps = kernel_floats(g.kernel_height, g.kernel_width);
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
    return ((plan.images - 1) / parts + 1) * ((plan.height - 1) / p.rows + 1);
}

// Calls visit(image, span) for each band of each image of a part: the rows of outputs, and those of inputs
// that they need.
template <class F>
void for_bands(const Plan& plan, const Pieces& p, long part, long parts, F visit) {
    for (long image = plan.images * part / parts; image < plan.images * (part + 1) / parts; image++)
        for (long begin = 0; begin < plan.height; begin += p.rows)
            visit(image, vertical_span(plan, begin, std::min(plan.height, begin + p.rows)));
}

// A kernel's geometry, seen from a band: the rows of the map above its first output take the place of zeros.
Geometry over_band(Geometry g, Span s) {
    g.padding_top -= s.begin - s.from;
    return g;
}

// The outputs of a band, of each group, from its inputs.
void correlate_band(const Plan& plan, const Pieces& p, Span s, long together, const float* in,
                    const float* kernel, float* out) {
    for (long g = 0; g < together; g++)
        correlate({.in = in + g * p.input, .in_height = s.to - s.from, .in_width = plan.width,
                   .kernel = kernel + g * p.taps, .geometry = over_band(plan.cropped, s),
                   .out = out + g * p.output, .out_height = s.end - s.begin, .out_width = plan.width});
}

// Leaves room for, and writes, the rows of zeros before and after those of each group's kernel, `size` floats
// apart; returns where the first group's other rows begin.
float* with_zero_rows(float* memory, long height, long width, long groups, long size) {
    const long zeros = (ROWS - 1) * width * LANES;
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

void direct_forward(const Plan& plan, const Images& x, const Images& weight, const float* bias, bool relu,
                    const Images& y, long parts, long begin, long end) {
    const Geometry& geometry = plan.cropped;
    const long width = plan.width;
    const Pieces p(plan, y.channels_last, false);
    const bool far = outputs_are_far(plan);
    Buffer taps{p.groups * p.taps}, in{p.groups * p.input}, out{p.groups * p.output};
    thread_arena().place({&taps, &in, &out});
    float* kernel = with_zero_rows(taps, geometry.kernel_height, geometry.kernel_width, p.groups, p.taps);
    for_groups(plan, p, begin, end, [&](long part, long channel, long together) {
        gather_kernel(plan, weight, channel, apart(together, p.taps), kernel);
        for_bands(plan, p, part, parts, [&](long image, Span s) {
            gather(x, image, channel, s.from * width, (s.to - s.from) * width, apart(together, p.input), in);
            correlate_band(plan, p, s, together, in, kernel, out);
            scatter(y, image, channel, s.begin * width, (s.end - s.begin) * width, apart(together, p.output),
                    out, bias ? bias + channel : nullptr, relu, far);
        });
    });
}

void direct_backward(const Plan& plan, const Images& grad_y, const Images& x, const Images& weight,
                     const Images& grad_x, float* grad_weight, long parts, long begin, long end) {
    const Geometry& geometry = plan.cropped;
    const long width = plan.width, number_of_taps = geometry.kernel_height * geometry.kernel_width;
    const bool far = outputs_are_far(plan);
    // `true`: narrow bands, a weight gradient each, would cost more than groups gain
    const Pieces p(plan, x.channels_last, true);
    const long band = kernel_floats(p.rows, width);  // floats of one group's x, in the kernel's place
    const long slots = grad_weight ? PairwiseSum::slots(bands_in_part(plan, p, parts)) : 0;
    const long sum = number_of_taps * LANES, sums_size = slots * sum;
    Buffer taps{p.groups * p.taps}, in{p.groups * p.input}, out{p.groups * p.output};
    Buffer bands{p.groups * band}, all_sums{p.groups * sums_size};
    thread_arena().place({&taps, &in, &out, &bands, &all_sums});
    float* kernel = with_zero_rows(taps, geometry.kernel_height, geometry.kernel_width, p.groups, p.taps);
    for_groups(plan, p, begin, end, [&](long part, long channel, long together) {
        gather_kernel(plan, weight, channel, apart(together, p.taps), kernel);
        // the gradient of a correlation is a correlation with the reversed kernel
        for (long g = 0; g < together; g++) reverse_taps(kernel + g * p.taps, number_of_taps);
        PairwiseSum sums[MOST_BLOCKS];  // over the bands, of each group
        for (long g = 0; g < together; g++) sums[g] = {all_sums + g * sums_size, sum};
        for_bands(plan, p, part, parts, [&](long image, Span s) {
            const long in_rows = s.to - s.from, out_rows = s.end - s.begin;
            gather(grad_y, image, channel, s.from * width, in_rows * width, apart(together, p.input), in);
            if (grad_x.data) {
                correlate_band(plan, p, s, together, in, kernel, out);
                scatter(grad_x, image, channel, s.begin * width, out_rows * width, apart(together, p.output),
                        out, nullptr, false, far);
            }
            if (!grad_weight) return;
            // x takes the kernel's place; the result is the weight gradient, reversed
            float* x_band = with_zero_rows(bands, out_rows, width, together, band);
            gather(x, image, channel, s.begin * width, out_rows * width, apart(together, band), x_band);
            Geometry of_x = over_band(geometry, s);
            of_x.kernel_height = out_rows, of_x.kernel_width = width;
            for (long g = 0; g < together; g++) {
                correlate({.in = in + g * p.input, .in_height = in_rows, .in_width = width,
                           .kernel = x_band + g * band, .geometry = of_x,
                           .out = sums[g].term(), .out_height = geometry.kernel_height,
                           .out_width = geometry.kernel_width});
                sums[g].add();
            }
        });
        if (!grad_weight) return;
        for (long g = 0; g < together; g++) reverse_taps(sums[g].total(), number_of_taps);
        scatter_kernel(plan, weight_gradient_of(plan, grad_weight, part), channel, apart(together, sums_size),
                       all_sums);
    });
}
