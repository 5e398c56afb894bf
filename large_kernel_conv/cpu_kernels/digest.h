// A digest of memory, to tell later whether it has changed.
#pragma once

#include <cstring>

#include "simd.h"

typedef uint64_t Words __attribute__((vector_size(4 * LANES)));
typedef uint64_t LooseWords __attribute__((vector_size(4 * LANES), aligned(1), may_alias));

// Each of its 64-bit words takes in the words of the memory that lie sizeof(Digest) apart, one after the
// other, in steps that could be undone: where only one of those changed, the digest always differs. Several
// changes would have to make up for each other, in each word of the digest that they reach. A step spreads a
// changed bit, whichever it is, over at least 33.
struct Digest {
    static constexpr int CHAINS = 8;  // that do not wait for each other: a multiplication takes long
    Words chains[CHAINS] = {};

    Digest(const void* memory, size_t bytes) {
        const char* p = (const char*)memory;
        for (; bytes >= sizeof(chains); bytes -= sizeof(chains), p += sizeof(chains)) take_in(p);
        if (!bytes) return;
        char rest[sizeof(chains)] = {};
        std::memcpy(rest, p, bytes);
        take_in(rest);
    }
    bool operator==(const Digest& other) const { return !std::memcmp(chains, other.chains, sizeof(chains)); }

  private:
    static constexpr uint64_t FACTOR = 0x9e3779b97f4a7c15;  // any odd number without a pattern
    INLINE void take_in(const char* p) {
        UNROLL for (int i = 0; i < CHAINS; i++) {
            // a product carries differences upwards only: the second one takes those of the highest bits,
            // signs, up from the middle
            const Words product = (chains[i] ^ ((const LooseWords*)p)[i]) * FACTOR;
            chains[i] = (product << 32 | product >> 32) * FACTOR;
        }
    }
};
