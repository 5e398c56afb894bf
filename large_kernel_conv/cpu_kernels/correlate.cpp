// The sums over taps, in patches of outputs that registers hold.
#include "correlate.h"

#include <algorithm>
#include <type_traits>
#include <utility>

#include "sums.h"

namespace {

// Outputs that are kept in registers: at most ROWS x COLUMNS accumulators.
constexpr int COLUMNS = LANES == 8 ? 6 : 8;

// A sum loses accuracy with the number of terms that are added one by one. One of more than PRODUCTS_IN_CHAIN
// products is therefore made of chains of about as many; CHAINS_IN_TERM of those are added up in the same
// way, and such sums in pairs.
constexpr long PRODUCTS_IN_CHAIN = 128, CHAINS_IN_TERM = 32;

// How far apart pixels, taps, and rows of taps are.
struct Steps {
    long pixel, tap, kernel_row;
};

// Adds one tap of each of the rows TOP ... BOTTOM to the columns FROM ... TO of the accumulators.
template <int TOP, int BOTTOM, int FROM, int TO, int R, int C>
INLINE void add_tap(Vec (&sum)[R][C], const float* in, const float* tap, Steps step) {
    Vec weight[R];
    UNROLL for (int r = TOP; r < BOTTOM; r++) weight[r] = in_register(load(tap - r * step.kernel_row));
    UNROLL for (int c = FROM; c < TO; c++) {
        Vec x = in_register(load(in + c * step.pixel));
        UNROLL for (int r = TOP; r < BOTTOM; r++) sum[r][c] += x * weight[r];
    }
}

// The taps that reach only the last C - CUT columns (the others lie left of the map), for CUT <= cut.
template <int TOP, int BOTTOM, int CUT, int R, int C>
INLINE void add_left_taps(Vec (&sum)[R][C], long cut, const float* in, const float* tap, Steps step) {
    if constexpr (CUT > 0) {
        if (CUT <= cut)
            add_tap<TOP, BOTTOM, CUT, C>(sum, in - CUT * step.pixel, tap - CUT * step.tap, step);
        add_left_taps<TOP, BOTTOM, CUT - 1>(sum, cut, in, tap, step);
    }
}

// The taps that reach only the first REACHED columns, for REACHED >= reached.
template <int TOP, int BOTTOM, int REACHED, int R, int C>
INLINE void add_right_taps(Vec (&sum)[R][C], long reached, const float* in, const float* tap, Steps step) {
    if constexpr (REACHED > 0) {
        if (REACHED >= reached)
            add_tap<TOP, BOTTOM, 0, REACHED>(sum, in - REACHED * step.pixel, tap - REACHED * step.tap, step);
        add_right_taps<TOP, BOTTOM, REACHED - 1>(sum, reached, in, tap, step);
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

// A patch of R x C outputs from (row, column) on; C <= in.width. LONG: of more than PRODUCTS_IN_CHAIN
// products each. DENSE: pixels and taps lie side by side, and outputs are sums alone.
template <bool LONG, bool DENSE, int R, int C>
void correlate_patch(const Correlation& t, long row, long column) {
    Vec sum[R][C] = {};
    std::conditional_t<LONG, Chains<R, C>, int> chains;
    const Rows &in = t.in, &kernel = t.kernel;
    const Steps step{DENSE ? LANES : in.pixel, DENSE ? LANES : kernel.pixel, kernel.row};
    const long top = row - t.padding_top;  // the input row that meets the first taps of output row `row`
    const long from = std::max(0L, top), to = std::min(in.height, top + R - 1 + kernel.height);
    // at output `column`: the tap that meets input column 0, one past that which meets the last input column
    const long left = t.padding_left - column, right = left + in.width;
    // taps that reach all C columns
    const long first = std::max(0L, left), last = std::min(kernel.width, right - C + 1);
    const long cut = std::min<long>(C - 1, left), reached = std::max(1L, right - kernel.width + 1);
    // input row i, of which output rows TOP ... BOTTOM meet taps
    auto add_row = [&]<int TOP, int BOTTOM>(long i, std::integer_sequence<int, TOP, BOTTOM>)
                       __attribute__((always_inline)) {
        const float* pixels = in.first + i * in.row;
        // those of output row `row`; those of row + r lie r rows before
        const float* taps = kernel.first + (i - top) * kernel.row;
        add_left_taps<TOP, BOTTOM, C - 1>(sum, cut, pixels, taps + left * step.tap, step);
        long k = first;
        do {
            const long end = LONG ? std::min(last, k + PRODUCTS_IN_CHAIN) : last;
            for (; k < end; k++)
                add_tap<TOP, BOTTOM, 0, C>(sum, pixels + (k - left) * step.pixel, taps + k * step.tap, step);
            if constexpr (LONG)
                if (k < last) chains.end_chain(sum);
        } while (LONG && k < last);
        add_right_taps<TOP, BOTTOM, C - 1>(sum, reached, pixels + in.width * step.pixel,
                                           taps + right * step.tap, step);
        if constexpr (LONG) chains.end_row(sum, std::min(kernel.width, in.width));
    };
    const std::integer_sequence<int, 0, R> all;
    if constexpr (R == 2) {  // small kernels: rows of zeros would be a good part of them
        long i = from;
        if (i == top && i < to) add_row(i++, std::integer_sequence<int, 0, 1>());
        for (; i < std::min(to, top + kernel.height); i++) add_row(i, all);
        if (i < to) add_row(i, std::integer_sequence<int, 1, 2>());
    } else {
        for (long i = from; i < to; i++) add_row(i, all);
    }
    if constexpr (LONG) chains.total(sum);
    if constexpr (!DENSE)
        if (t.finish)
            UNROLL for (int r = 0; r < R; r++)
                UNROLL for (int c = 0; c < C; c++) sum[r][c] = (*t.finish)(sum[r][c]);
    UNROLL for (int r = 0; r < R; r++) {
        float* out = t.out.at(row + r, column);
        UNROLL for (int c = 0; c < C; c++) store(out + c * (DENSE ? LANES : t.out.pixel), sum[r][c]);
    }
}

template <bool LONG, bool DENSE, int R, int... C>
void correlate_rows(const Correlation& t, long row, std::integer_sequence<int, C...>) {
    using Patch = void (*)(const Correlation&, long row, long column);
    static constexpr Patch patches[] = {&correlate_patch<LONG, DENSE, R, C + 1>...};
    const long widest = std::min<long>(COLUMNS, t.in.width), number = (t.out.width + widest - 1) / widest;
    for (long b = 0, column = 0; b < number; b++) {
        long columns = (t.out.width - column) / (number - b);  // nearly equal patches
        patches[columns - 1](t, row, column);
        column += columns;
    }
}

template <bool LONG, bool DENSE>
void correlate_all(const Correlation& t) {
    constexpr std::make_integer_sequence<int, COLUMNS> columns;
    long row = 0;
    // ROWS rows of outputs meet ROWS - 1 rows of zeros on either side of the kernel: too many for a small one
    if (t.kernel.height > 9 && t.zero_rows)
        for (; row + ROWS <= t.out.height; row += ROWS) correlate_rows<LONG, DENSE, ROWS>(t, row, columns);
    for (; row + 2 <= t.out.height; row += 2) correlate_rows<LONG, DENSE, 2>(t, row, columns);
    if (row < t.out.height) correlate_rows<LONG, DENSE, 1>(t, row, columns);
}

}  // namespace

void correlate(const Correlation& t) {
    if (!t.in.width) {
        for (long i = 0; i < t.out.height; i++)
            for (long j = 0; j < t.out.width; j++)
                store(t.out.at(i, j), t.finish ? (*t.finish)(Vec{}) : Vec{});
        return;
    }
    const long products = std::min(t.kernel.height, t.in.height) * std::min(t.kernel.width, t.in.width);
    const bool dense = t.in.pixel == LANES && t.kernel.pixel == LANES && t.out.pixel == LANES && !t.finish;
    if (products > PRODUCTS_IN_CHAIN) dense ? correlate_all<true, true>(t) : correlate_all<true, false>(t);
    else dense ? correlate_all<false, true>(t) : correlate_all<false, false>(t);
}
