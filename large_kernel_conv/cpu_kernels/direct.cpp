// The convolution as it is written down, over the taps that do not lie in the padding. For small kernels and small maps.
#include <algorithm>

#include "kernels.h"
#include "layout.h"
#include "simd.h"
#include "sums.h"

namespace {

// Outputs that one call keeps in registers: at most ROWS x COLUMNS accumulators.
constexpr int ROWS = LANES == 8 ? 2 : 3;
constexpr int COLUMNS = LANES == 8 ? 6 : 8;

// A sum loses accuracy with the number of terms that are added one by one. One of more than CHAIN products is therefore made of
// chains of about as many; CHAINS of those are added up in the same way, and such sums in pairs.
constexpr long CHAIN = 128, CHAINS = 32;

// out[i][j] = sum over a, b of in[i + a - pad_height][j + b - pad_width] * kernel[a][b], each entry a vector of LANES channels.
// `kernel` has ROWS - 1 rows of zeros before its first row and after its last one, for blocks of more than two rows.
struct Correlation {
    const float* in;
    long in_height, in_width;
    const float* kernel;
    long kernel_height, kernel_width;
    float* out;
    long out_height, out_width;
    long pad_height, pad_width;
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

// The taps that reach only the first KEPT columns, for KEPT >= kept.
template <int TOP, int BOTTOM, int KEPT, int R, int C>
INLINE void add_right_taps(Vec (&sum)[R][C], long kept, const float* in, const float* tap, long kernel_row) {
    if constexpr (KEPT > 0) {
        if (KEPT >= kept) add_tap<TOP, BOTTOM, 0, KEPT>(sum, in - KEPT * LANES, tap - KEPT * LANES, kernel_row);
        add_right_taps<TOP, BOTTOM, KEPT - 1>(sum, kept, in, tap, kernel_row);
    }
}

// The chains that ended, of R x C accumulators.
template <int R, int C>
class Chains {
  public:
    Chains() { std::fill_n(sums.term(), R * C * LANES, 0.f); }
    INLINE void end_row(Vec (&sum)[R][C], long products) {  // products, at most, that a row of the input gives each accumulator
        length += products;
        if (length + products > CHAIN) end_chain(sum);
    }
    INLINE void end_chain(Vec (&sum)[R][C]) {
        float* chains = sums.term();
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int c = 0; c < C; c++, chains += LANES) store(chains, load(chains) + sum[r][c]), sum[r][c] = Vec{};
        length = 0;
        if (++number % CHAINS) return;
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
    alignas(Vec) float memory[PairwiseSum::slots(MOST_PRODUCTS / CHAINS / CHAIN) * R * C * LANES];
    PairwiseSum sums{memory, R * C * LANES};
    long length = 0, number = 0;
};

// R x C outputs from (row, column) on; C <= in_width. LONG: of more than CHAIN products each.
template <bool LONG, int R, int C>
void correlate_block(const Correlation& t, long row, long column) {
    Vec sum[R][C] = {};
    std::conditional_t<LONG, Chains<R, C>, int> chains;
    const long kernel_row = t.kernel_width * LANES;
    const long top = row - t.pad_height;  // the input row that meets the first taps of output row `row`
    const long from = std::max(0L, top), to = std::min(t.in_height, top + R - 1 + t.kernel_height);
    const long left = t.pad_width - column;                            // the tap that meets input column 0 at output `column`
    const long right = t.in_width + t.pad_width - column;              // one past the tap that meets the last input column there
    const long first = std::max(0L, left), last = std::min(t.kernel_width, right - C + 1);  // taps that reach all C columns
    const long cut = std::min<long>(C - 1, left), kept = std::max(1L, right - t.kernel_width + 1);
    // input row i, of which output rows TOP ... BOTTOM meet taps
    auto add_row = [&]<int TOP, int BOTTOM>(long i, std::integer_sequence<int, TOP, BOTTOM>) __attribute__((always_inline)) {
        const float* in = t.in + i * t.in_width * LANES;
        const float* taps = t.kernel + (i - top) * kernel_row;  // those of output row `row`; those of row + r lie r rows before
        add_left_taps<TOP, BOTTOM, C - 1>(sum, cut, in, taps + left * LANES, kernel_row);
        long k = first;
        do {
            const long end = LONG ? std::min(last, k + CHAIN) : last;
            for (; k < end; k++) add_tap<TOP, BOTTOM, 0, C>(sum, in + (k - left) * LANES, taps + k * LANES, kernel_row);
            if constexpr (LONG)
                if (k < last) chains.end_chain(sum);
        } while (LONG && k < last);
        add_right_taps<TOP, BOTTOM, C - 1>(sum, kept, in + t.in_width * LANES, taps + right * LANES, kernel_row);
        if constexpr (LONG) chains.end_row(sum, std::min(t.kernel_width, t.in_width));
    };
    const std::integer_sequence<int, 0, R> all;
    if constexpr (R == 2) {  // small kernels: rows of zeros would be a good part of them
        long i = from;
        if (i == top && i < to) add_row(i++, std::integer_sequence<int, 0, 1>());
        for (; i < std::min(to, top + t.kernel_height); i++) add_row(i, all);
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
    static constexpr decltype(&correlate_block<false, 1, 1>) blocks[] = {&correlate_block<LONG, R, C + 1>...};
    const long widest = std::min<long>(COLUMNS, t.in_width), number = (t.out_width + widest - 1) / widest;
    for (long b = 0, column = 0; b < number; b++) {
        long columns = (t.out_width - column) / (number - b);  // nearly equal blocks
        blocks[columns - 1](t, row, column);
        column += columns;
    }
}

template <bool LONG>
void correlate_all(const Correlation& t) {
    constexpr std::make_integer_sequence<int, COLUMNS> columns;
    long row = 0;
    // ROWS rows of outputs meet ROWS - 1 rows of zeros on either side of the kernel: too many for a small one
    if (t.kernel_height > 9)
        for (; row + ROWS <= t.out_height; row += ROWS) correlate_rows<LONG, ROWS>(t, row, columns);
    for (; row + 2 <= t.out_height; row += 2) correlate_rows<LONG, 2>(t, row, columns);
    if (row < t.out_height) correlate_rows<LONG, 1>(t, row, columns);
}

void correlate(const Correlation& t) {
    const long products = std::min(t.kernel_height, t.in_height) * std::min(t.kernel_width, t.in_width);
    products > CHAIN ? correlate_all<true>(t) : correlate_all<false>(t);
}

size_t kernel_floats(long height, long width) { return (height + 2 * (ROWS - 1)) * width * LANES; }

// How the work is cut into pieces whose data fit the cache.
struct Pieces {
    long groups;         // of LANES channels, computed together
    long rows;           // of outputs in a band
    long input, output;  // floats of one group's band
    long taps;           // floats of one group's kernel, with rows of zeros

    // `whole_maps`: several groups only where a band can be a whole map.
    Pieces(const Plan& plan, bool channels_last, bool whole_maps) {
        constexpr long CACHE = 256 * 1024;
        auto fitting = [&] { return CACHE / (plan.width * groups * LANES * 4) - plan.kernel_height + 1; };
        // where channels lie together, a group alone takes too small a part of each pixel, and pixels may lie on as many pages
        groups = channels_last ? MOST_BLOCKS : 1;
        if (whole_maps && fitting() < plan.height) groups = 1;
        rows = std::min(plan.height, std::max(fitting(), 4L * ROWS));
        input = std::min(plan.height, rows + plan.kernel_height - 1) * plan.width * LANES;
        output = rows * plan.width * LANES;
        taps = kernel_floats(plan.kernel_height, plan.kernel_width);
    }
};

// Calls visit(part, channel, together) for the groups of the tasks `begin` ... `end` that are computed together.
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

// Calls visit(image, span) for each band of each image of a part: output rows begin ... end need the input rows from ... to.
template <class F>
void for_bands(const Plan& plan, const Pieces& p, long part, long parts, F visit) {
    const long reach = plan.kernel_height / 2;
    for (long image = plan.images * part / parts; image < plan.images * (part + 1) / parts; image++)
        for (long begin = 0; begin < plan.height; begin += p.rows) {
            const long end = std::min(plan.height, begin + p.rows);
            visit(image, Span{begin, end, std::max(0L, begin - reach), std::min(plan.height, end + reach)});
        }
}

// The outputs of a band, of each group, from its inputs.
void correlate_band(const Plan& plan, const Pieces& p, Span s, long together, const float* in, const float* kernel, float* out) {
    for (long g = 0; g < together; g++)
        correlate({in + g * p.input, s.to - s.from, plan.width, kernel + g * p.taps, plan.kernel_height, plan.kernel_width,
                   out + g * p.output, s.end - s.begin, plan.width, plan.kernel_height / 2 - s.begin + s.from,
                   plan.kernel_width / 2});
}

// Leaves room for, and writes, the rows of zeros before and after those of each group's kernel, `size` floats apart; returns
// where the first group's other rows begin.
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

}  // namespace

void direct_forward(const Plan& plan, const Images& x, const Images& weight, const float* bias, bool relu, const Images& y,
                    long parts, long begin, long end) {
    const Pieces p(plan, y.channels_last, false);
    const bool far = outputs_are_far(plan);
    float* memory = scratch_memory(p.groups * (p.taps + p.input + p.output));
    float *in = memory + p.groups * p.taps, *out = in + p.groups * p.input;
    float* kernel = with_zero_rows(memory, plan.kernel_height, plan.kernel_width, p.groups, p.taps);
    for_groups(plan, p, begin, end, [&](long part, long channel, long together) {
        gather_kernel(plan, weight, channel, {together, LANES, p.taps}, kernel);
        for_bands(plan, p, part, parts, [&](long image, Span s) {
            gather(x, image, channel, s.from * plan.width, (s.to - s.from) * plan.width, {together, LANES, p.input}, in);
            correlate_band(plan, p, s, together, in, kernel, out);
            scatter(y, image, channel, s.begin * plan.width, (s.end - s.begin) * plan.width, {together, LANES, p.output}, out,
                    bias ? bias + channel : nullptr, relu, far);
        });
    });
}

void direct_backward(const Plan& plan, const Images& grad_y, const Images& x, const Images& weight, const Images& grad_x,
                     float* grad_weight, long parts, long begin, long end) {
    const long height = plan.kernel_height, width = plan.kernel_width, sum = height * width * LANES;
    const bool far = outputs_are_far(plan);
    const Pieces p(plan, x.channels_last, true);  // narrow bands, a weight gradient each, would cost more than groups gain
    const long band_taps = kernel_floats(p.rows, plan.width);
    const long sums_size = grad_weight ? PairwiseSum::slots(bands_in_part(plan, p, parts)) * sum : 0;
    float* memory = scratch_memory(p.groups * (p.taps + p.input + p.output + band_taps + sums_size));
    float *in = memory + p.groups * p.taps, *out = in + p.groups * p.input, *x_memory = out + p.groups * p.output;
    float* sums_memory = x_memory + p.groups * band_taps;
    float* kernel = with_zero_rows(memory, height, width, p.groups, p.taps);
    for_groups(plan, p, begin, end, [&](long part, long channel, long together) {
        gather_kernel(plan, weight, channel, {together, LANES, p.taps}, kernel);
        // the gradient of a correlation is a correlation with the reversed kernel
        for (long g = 0; g < together; g++) reverse_taps(kernel + g * p.taps, height * width);
        PairwiseSum sums[MOST_BLOCKS];  // over the bands, of each group
        for (long g = 0; g < together; g++) sums[g] = {sums_memory + g * sums_size, sum};
        for_bands(plan, p, part, parts, [&](long image, Span s) {
            const long in_rows = s.to - s.from, out_rows = s.end - s.begin;
            gather(grad_y, image, channel, s.from * plan.width, in_rows * plan.width, {together, LANES, p.input}, in);
            if (grad_x.data) {
                correlate_band(plan, p, s, together, in, kernel, out);
                scatter(grad_x, image, channel, s.begin * plan.width, out_rows * plan.width, {together, LANES, p.output}, out,
                        nullptr, false, far);
            }
            if (!grad_weight) return;
            // x takes the kernel's place; the result is the weight gradient, reversed
            float* band = with_zero_rows(x_memory, out_rows, plan.width, together, band_taps);
            gather(x, image, channel, s.begin * plan.width, out_rows * plan.width, {together, LANES, band_taps}, band);
            for (long g = 0; g < together; g++) {
                correlate({in + g * p.input, in_rows, plan.width, band + g * band_taps, out_rows, plan.width, sums[g].term(),
                           height, width, height / 2 - s.begin + s.from, width / 2});
                sums[g].add();
            }
        });
        if (!grad_weight) return;
        for (long g = 0; g < together; g++) reverse_taps(sums[g].total(), height * width);
        Images target = weight;
        target.data = grad_weight + part * plan.channels * plan.kernel * plan.kernel, target.type = Type::float32;
        scatter_kernel(plan, target, channel, {together, LANES, sums_size}, sums_memory);
    });
}
