// Asking for memory ahead of its use, a little at a time.
#pragma once

#include "simd.h"

constexpr int CACHE_LINE = 64;  // bytes

// Memory that will be used next: runs of `bytes`, `stride` bytes apart. Whoever computes meanwhile asks for
// it in steps. Asked for at once it would be waited for, since only few requests can be under way at a time.
struct Ahead {
    const char* place;
    long stride, bytes;
    long runs, each;  // `each`: runs in a step
    bool written;     // or else read

    INLINE void step() {
        const long now = runs < each ? runs : each;
        runs -= now;
        if (written) ask<true>(now);
        else ask<false>(now);
    }

  private:
    template <bool WRITTEN>
    INLINE void ask(long now) {
        if (bytes <= 2 * CACHE_LINE) {  // pixels: worth a loop without an inner one
            for (; now > 0; now--, place += stride)
                __builtin_prefetch(place, WRITTEN), __builtin_prefetch(place + bytes - 1, WRITTEN);
        } else {
            for (; now > 0; now--, place += stride)
                for (long i = 0; i < bytes; i += CACHE_LINE) __builtin_prefetch(place + i, WRITTEN);
        }
    }
};

static INLINE void step(Ahead* ahead) {  // null: nothing to ask for
    if (ahead) ahead->step();
}

static INLINE void prefetch_complex(const float* p) {
    asm volatile("");  // else GCC removes calls: a function that only prefetches seems to have no effect
    UNROLL for (int i = 0; i < PAIR; i += CACHE_LINE / (int)sizeof(float)) __builtin_prefetch(p + i);
}
