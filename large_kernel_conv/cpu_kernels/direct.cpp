// The convolution as it is written down, over the taps that do not lie in the padding. For small kernels and small maps.
#include <algorithm>

#include "kernels.h"
#include "layout.h"
#include "simd.h"

namespace {

// Outputs that one call keeps in registers: at most ROWS x COLUMNS accumulators.
constexpr int ROWS = LANES == 8 ? 2 : 3;
constexpr int COLUMNS = LANES == 8 ? 6 : 8;

// out[i][j] = sum over a, b of in[i + a - pad_height][j + b - pad_width] * kernel[a][b], each entry a vector of LANES channels.
// `kernel` has ROWS - 1 rows of zeros before its first row and after its last one.
struct Correlation {
    const float* in;
    long in_height, in_width;
    const float* kernel;
    long kernel_height, kernel_width;
    float* out;
    long out_height, out_width;
    long pad_height, pad_width;
};

// Adds one tap of each of R rows to the columns FROM ... TO of the accumulators.
template <int R, int C, int FROM, int TO>
INLINE void add_tap(Vec (&sum)[R][C], const float* in, const float* tap, long kernel_row) {
    Vec weight[R];
    UNROLL for (int r = 0; r < R; r++) weight[r] = in_register(load(tap - r * kernel_row));
    UNROLL for (int c = FROM; c < TO; c++) {
        Vec x = in_register(load(in + c * LANES));
        UNROLL for (int r = 0; r < R; r++) sum[r][c] += x * weight[r];
    }
}

// The taps that reach only the last C - CUT columns (the others lie left of the map), for CUT <= cut.
template <int R, int C, int CUT>
INLINE void add_left_taps(Vec (&sum)[R][C], long cut, const float* in, const float* tap, long kernel_row) {
    if constexpr (CUT > 0) {
        if (CUT <= cut) add_tap<R, C, CUT, C>(sum, in - CUT * LANES, tap - CUT * LANES, kernel_row);
        add_left_taps<R, C, CUT - 1>(sum, cut, in, tap, kernel_row);
    }
}

// The taps that reach only the first KEPT columns, for KEPT >= kept.
template <int R, int C, int KEPT>
INLINE void add_right_taps(Vec (&sum)[R][C], long kept, const float* in, const float* tap, long kernel_row) {
    if constexpr (KEPT > 0) {
        if (KEPT >= kept) add_tap<R, C, 0, KEPT>(sum, in - KEPT * LANES, tap - KEPT * LANES, kernel_row);
        add_right_taps<R, C, KEPT - 1>(sum, kept, in, tap, kernel_row);
    }
}

// R x C outputs from (row, column) on; C <= in_width.
template <int R, int C>
void correlate_block(const Correlation& t, long row, long column) {
    Vec sum[R][C] = {};
    const long kernel_row = t.kernel_width * LANES;
    const long from = std::max(0L, row - t.pad_height);
    const long to = std::min(t.in_height, row + R - 1 - t.pad_height + t.kernel_height);
    const long left = t.pad_width - column;                            // the tap that meets input column 0 at output `column`
    const long right = t.in_width + t.pad_width - column;              // one past the tap that meets the last input column there
    const long first = std::max(0L, left), last = std::min(t.kernel_width, right - C + 1);  // taps that reach all C columns
    const long cut = std::min<long>(C - 1, left), kept = std::max(1L, right - t.kernel_width + 1);
    for (long i = from; i < to; i++) {
        const float* in = t.in + i * t.in_width * LANES;
        // the taps of output row `row`; those of row + r lie r rows before
        const float* taps = t.kernel + (i - row + t.pad_height) * kernel_row;
        add_left_taps<R, C, C - 1>(sum, cut, in, taps + left * LANES, kernel_row);
        for (long k = first; k < last; k++) add_tap<R, C, 0, C>(sum, in + (k - left) * LANES, taps + k * LANES, kernel_row);
        add_right_taps<R, C, C - 1>(sum, kept, in + t.in_width * LANES, taps + right * LANES, kernel_row);
    }
    float* out = t.out + (row * t.out_width + column) * LANES;
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int c = 0; c < C; c++) store(out + (r * t.out_width + c) * LANES, sum[r][c]);
}

template <int R, int... C>
void correlate_rows(const Correlation& t, long row, std::integer_sequence<int, C...>) {
    static constexpr decltype(&correlate_block<1, 1>) blocks[] = {&correlate_block<R, C + 1>...};
    const long widest = std::min<long>(COLUMNS, t.in_width), number = (t.out_width + widest - 1) / widest;
    for (long b = 0, column = 0; b < number; b++) {
        long columns = (t.out_width - column) / (number - b);  // nearly equal blocks
        blocks[columns - 1](t, row, column);
        column += columns;
    }
}

void correlate(const Correlation& t) {
    constexpr std::make_integer_sequence<int, COLUMNS> columns;
    long row = 0;
    // R rows of outputs meet R - 1 rows of zeros on either side of the kernel: too many for a small one
    if (t.kernel_height > 9)
        for (; row + ROWS <= t.out_height; row += ROWS) correlate_rows<ROWS>(t, row, columns);
    for (; row + 2 <= t.out_height; row += 2) correlate_rows<2>(t, row, columns);
    if (row < t.out_height) correlate_rows<1>(t, row, columns);
}

// Rows of a band of outputs: as many as let its inputs fit the cache.
long band_height(const Plan& plan) {
    constexpr long CACHE = 256 * 1024;
    const long fitting = CACHE / (plan.width * LANES * 4) - plan.kernel_height + 1;
    return std::min(plan.height, std::max(fitting, 4L * ROWS));
}
size_t input_floats(const Plan& plan) {  // of a band
    return std::min(plan.height, band_height(plan) + plan.kernel_height - 1) * plan.width * LANES;
}

// Calls visit with each band's output rows begin ... end, and the input rows from ... to that they need.
template <class F>
void for_bands(const Plan& plan, F visit) {
    const long reach = plan.kernel_height / 2, rows = band_height(plan);
    for (long begin = 0; begin < plan.height; begin += rows) {
        const long end = std::min(plan.height, begin + rows);
        visit(Span{begin, end, std::max(0L, begin - reach), std::min(plan.height, end + reach)});
    }
}

size_t kernel_floats(long height, long width) { return (height + 2 * (ROWS - 1)) * width * LANES; }

// Leaves room for, and writes, the rows of zeros before and after; returns where the rows between them lie.
float* with_zero_rows(float* memory, long height, long width) {
    const long zeros = (ROWS - 1) * width * LANES;
    std::fill_n(memory, zeros, 0.f);
    std::fill_n(memory + zeros + height * width * LANES, zeros, 0.f);
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
                    long begin, long end) {
    const long height = plan.kernel_height, width = plan.kernel_width, input = input_floats(plan);
    float* memory = scratch_memory(kernel_floats(height, width) + input + band_height(plan) * plan.width * LANES);
    float *kernel = with_zero_rows(memory, height, width), *in = memory + kernel_floats(height, width), *out = in + input;
    long present = -1;  // the channel group whose kernel is in memory
    for (long task = begin; task < end; task++) {
        const long group = task / plan.images, image = task % plan.images, channel = group * LANES;
        if (group != present) gather_kernel(plan, weight, channel, 1, kernel), present = group;
        for_bands(plan, [&](Span s) {
            gather(x, image, channel, s.from * plan.width, (s.to - s.from) * plan.width, 1, in);
            correlate({in, s.to - s.from, plan.width, kernel, height, width, out, s.end - s.begin, plan.width,
                       height / 2 - s.begin + s.from, width / 2});
            scatter(y, image, channel, s.begin * plan.width, (s.end - s.begin) * plan.width, 1, out,
                    bias ? bias + channel : nullptr, relu);
        });
    }
}

void direct_backward(const Plan& plan, const Images& grad_y, const Images& x, const Images& weight, const Images& grad_x,
                     float* grad_weight, long parts, long begin, long end) {
    const long height = plan.kernel_height, width = plan.kernel_width, input = input_floats(plan), rows = band_height(plan);
    float* memory = scratch_memory(kernel_floats(height, width) + input + rows * plan.width * LANES +
                                   kernel_floats(rows, plan.width) + 2 * height * width * LANES);
    float *kernel = with_zero_rows(memory, height, width), *in = memory + kernel_floats(height, width), *out = in + input;
    float *x_memory = out + rows * plan.width * LANES, *sums = x_memory + kernel_floats(rows, plan.width);
    float* band_sums = sums + height * width * LANES;
    for (long task = begin; task < end; task++) {
        const long group = task / parts, part = task % parts, channel = group * LANES;
        gather_kernel(plan, weight, channel, 1, kernel);
        reverse_taps(kernel, height * width);  // the gradient of a correlation is a correlation with the reversed kernel
        std::fill_n(sums, height * width * LANES, 0.f);
        for (long image = plan.images * part / parts; image < plan.images * (part + 1) / parts; image++) {
            for_bands(plan, [&](Span s) {
                const long first = s.begin * plan.width, pixels = (s.end - s.begin) * plan.width;
                const long pad_height = height / 2 - s.begin + s.from;
                gather(grad_y, image, channel, s.from * plan.width, (s.to - s.from) * plan.width, 1, in);
                if (grad_x.data) {
                    correlate({in, s.to - s.from, plan.width, kernel, height, width, out, s.end - s.begin, plan.width, pad_height,
                               width / 2});
                    scatter(grad_x, image, channel, first, pixels, 1, out, nullptr, false);
                }
                if (grad_weight) {  // x takes the kernel's place; the result is the weight gradient, reversed
                    float* band = with_zero_rows(x_memory, s.end - s.begin, plan.width);
                    gather(x, image, channel, first, pixels, 1, band);
                    correlate({in, s.to - s.from, plan.width, band, s.end - s.begin, plan.width, band_sums, height, width,
                               pad_height, width / 2});
                    // added up by bands: a sum of all pixels of a large map, one by one, would lose accuracy
                    for (long i = 0; i < height * width * LANES; i += LANES)
                        store(sums + i, load(sums + i) + load(band_sums + i));
                }
            });
        }
        if (grad_weight) {
            reverse_taps(sums, height * width);
            Images target = weight;
            target.data = grad_weight + part * plan.channels * plan.kernel * plan.kernel, target.type = Type::float32;
            scatter_kernel(plan, target, channel, 1, sums);
        }
    }
}
