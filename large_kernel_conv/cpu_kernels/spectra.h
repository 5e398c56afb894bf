// Spectra of a group's kernels, and their products with those of its pixels.
#pragma once

#include "digest.h"
#include "fft.h"
#include "kernels.h"
#include "simd.h"

// Where tap i lies in a sequence of `size`, for a correlation: its own pixel's tap at 0, in reverse.
inline long tap_place(const Axis& axis, long i, long size) {
    const long place = axis.padding - i * axis.dilation;
    return place < 0 ? place + size : place;
}

// Coefficients 0 and 1 of two real sequences are packed: two real numbers each, one of each block, which were
// not doubled. Times 4, as the product of two others is, each of which was doubled.
INLINE Complex product_of_packed(Complex a, Complex b) {
    const Vec four = splat(4);
    return {four * a.re * b.re, four * a.im * b.im};
}
// What makes up for doubled factors, and for transforms that do not scale, of so many points.
inline Vec scale_of(long points) { return splat(0.25f / points); }

// The spectrum of one group: the one computed before, if the weights are still those that it was computed
// from.
struct GroupSpectrum {
    const Plan& plan;
    const Images& weight;
    const Spectra& spectra;
    long present = -1;
    const float* spectrum = nullptr;

    // own_spectrum, of the method whose workspace this is: computes it, and returns where.
    template <class Workspace>
    const float* of(long group, const Workspace& w) {
        if (group == present) return spectrum;
        present = group, spectrum = spectra.values + group * plan.spectrum_size();
        if (spectra.digests && !(spectra.digests[group] == group_digest(plan, weight, group))) {
            *spectra.stale = true;
            spectrum = own_spectrum(plan, weight, group * PAIR, w);
        }
        return spectrum;
    }
};
