// The choice between the kernels, and thread-local memory.
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <new>

#include "fft.h"
#include "kernels.h"

namespace {

// Pairs of an output and a tap that meet inside an axis of `length`, the padding left out.
double meetings(long length, long kernel) {
    const double reach = kernel / 2;
    return length * (2 * reach + 1) - reach * (reach + 1);
}

struct Axis {
    const Transform* transform;
    long tile;  // outputs of one transform
};

// The cheapest way to cut one axis into tiles. A kernel wider than the axis was cropped before.
Axis cut_axis(long length, long kernel) {
    int number;
    const Transform* const* all = transforms(number);
    const long reach = kernel / 2;
    Axis best{};
    double least = std::numeric_limits<double>::infinity();
    for (int i = 0; i < number; i++) {
        const long size = all[i]->size;
        // one tile wraps around into the zeros beyond the map; of several, each needs its neighbours' pixels on both sides
        const long tile = size >= length + reach ? length : size - 2 * reach;
        if (tile <= 0) continue;
        const long tiles = tile == length ? 1 : (length - 1) / tile + 1;  // a division takes long
        const double cost = tiles * (double)all[i]->cost;
        if (cost < least) least = cost, best = {all[i], (length - 1) / tiles + 1};
    }
    return best;
}

}  // namespace

long Plan::channel_groups() const { return (channels - 1) / (rows ? PAIR : LANES) + 1; }
size_t Plan::spectrum_size() const { return (size_t)rows->size * columns->size * PAIR; }

Plan make_plan(long images, long channels, long height, long width, long kernel) {
    // taps further from the middle than the map is long meet no pixel
    Plan plan{images, channels, height, width, kernel, std::min(kernel, 2 * height - 1), std::min(kernel, 2 * width - 1),
              nullptr, nullptr, height, width, 1, 1};
    const Axis vertical = cut_axis(height, plan.kernel_height), horizontal = cut_axis(width, plan.kernel_width);
    if (!vertical.transform || !horizontal.transform) return plan;

    // Vector instructions for two times LANES channels. The constants, for what goes with the direct kernel's multiplications
    // and with the products of spectra, fit the times measured on Zen 5.
    const double direct = 2 * 1.7 * meetings(height, plan.kernel_height) * meetings(width, plan.kernel_width);
    const long tiles_down = (height - 1) / vertical.tile + 1, tiles_across = (width - 1) / horizontal.tile + 1;
    const double rows_in = std::min(height, vertical.tile + plan.kernel_height - 1), rows_out = vertical.tile;
    const double points = (double)vertical.transform->size * horizontal.transform->size;
    const double of_rows = (rows_in + rows_out) * horizontal.transform->cost;
    const double of_columns = 2.0 * horizontal.transform->size * vertical.transform->cost;
    const double in_parts = tiles_down * tiles_across > 1 ? 1.15 : 1;  // in NCHW, parts of rows are gathered more slowly
    const double fft = in_parts * tiles_down * tiles_across * (of_rows + of_columns + 15 * points);
    if (fft < direct) {
        plan.rows = horizontal.transform, plan.columns = vertical.transform;
        plan.tile_height = vertical.tile, plan.tile_width = horizontal.tile;
        plan.tiles_down = tiles_down, plan.tiles_across = tiles_across;
    }
    return plan;
}

namespace {

// Columns of a map lie on as many pages as it has rows: large pages spare the address translations.
constexpr size_t LARGE_PAGE = 2 << 20;
size_t alignment_of(size_t floats) { return floats * sizeof(float) >= LARGE_PAGE / 2 ? LARGE_PAGE : 64; }

}  // namespace

size_t allocated_bytes(size_t floats) {
    const size_t alignment = alignment_of(floats);
    return (floats * sizeof(float) + alignment - 1) / alignment * alignment;
}

float* allocate(size_t floats) {
    void* memory = std::aligned_alloc(alignment_of(floats), allocated_bytes(floats));
    if (!memory) throw std::bad_alloc();
    if (alignment_of(floats) == LARGE_PAGE) advise_large_pages(memory, allocated_bytes(floats));
    return (float*)memory;
}

void advise_large_pages(void* memory, size_t bytes) {
#ifdef MADV_HUGEPAGE  // on Linux; where the system refuses, normal pages serve
    const uintptr_t first = ((uintptr_t)memory + LARGE_PAGE - 1) / LARGE_PAGE * LARGE_PAGE;
    const uintptr_t last = ((uintptr_t)memory + bytes) / LARGE_PAGE * LARGE_PAGE;
    if (last > first) madvise((void*)first, last - first, MADV_HUGEPAGE);
#endif
}

float* Scratch::get(size_t floats) {
    if (floats > size) {
        memory.reset(), size = 0;
        memory.reset(allocate(floats)), size = floats;
    }
    return memory.get();
}

float* scratch_memory(size_t floats) {
    static thread_local Scratch scratch;
    return scratch.get(floats);
}
