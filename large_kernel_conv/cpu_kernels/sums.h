// Sums whose error hardly grows with the number of their terms.
#pragma once

#include <bit>

#include "simd.h"

// The sum of terms of `floats` floats each, in pairs: of two terms, of two such sums, and so on. Each term
// then goes through about as many additions as their number has binary digits; added one by one, the first
// would go through all.
class PairwiseSum {
  public:
    PairwiseSum() = default;
    PairwiseSum(float* memory, long floats) : memory(memory), last(memory), floats(floats) {}

    // How many times `floats` the memory for up to `terms` terms is.
    static constexpr int slots(unsigned long terms) { return terms < 2 ? 1 : std::bit_width(terms - 1) + 1; }

    float* term() { return last; }  // where the next term is to be written; add() then adds it
    __attribute__((noinline)) void add() {
        last += floats;
        for (long pairs = ++terms; pairs % 2 == 0; pairs /= 2) add_last_two();
    }
    float* total() {  // where it then lies, `memory`; after the last of at least one term
        while (last > memory + floats) add_last_two();
        return memory;
    }

  private:
    // Sums of a power of two terms each, the larger ones first.
    float *memory, *last;
    long floats, terms = 0;

    void add_last_two() {
        last -= floats;
        float* sum = last - floats;
        for (long i = 0; i < floats; i += LANES) store(sum + i, load(sum + i) + load(last + i));
    }
};
