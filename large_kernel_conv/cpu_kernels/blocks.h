// Two blocks of LANES channels, A and B, are the real and the imaginary part of one complex map. Its transform Z holds both
// spectra, which conjugate symmetry takes apart: A = (Z(k) + conj Z(-k)) / 2, B = (Z(k) - conj Z(-k)) / 2i.
#pragma once

#include "simd.h"

// One frequency of A and of B.
struct Blocks {
    Complex a, b;
};
constexpr int FREQUENCY = 2 * PAIR;  // floats of one Blocks

// 2 A and 2 B at k, from Z at k and at -k.
static INLINE Blocks take_apart(Complex z, Complex mirrored) {
    return {{z.re + mirrored.re, z.im - mirrored.im}, {z.im + mirrored.im, mirrored.re - z.re}};
}
// Z at k and at -k, from A and B at k.
static INLINE void put_together(Blocks f, Complex& z, Complex& mirrored) {
    z = plus_i(f.a, f.b);
    mirrored = {f.a.re + f.b.im, f.b.re - f.a.im};
}

static INLINE Blocks product(Blocks f, Blocks g) { return {product(f.a, g.a), product(f.b, g.b)}; }
static INLINE Blocks product_conjugate(Blocks f, Blocks g) { return {product_conjugate(f.a, g.a), product_conjugate(f.b, g.b)}; }
static INLINE Blocks operator+(Blocks f, Blocks g) { return {f.a + g.a, f.b + g.b}; }
static INLINE Blocks scaled(Blocks f, Vec s) { return {{f.a.re * s, f.a.im * s}, {f.b.re * s, f.b.im * s}}; }

static INLINE Blocks load_blocks(const float* p) { return {load_complex(p), load_complex(p + PAIR)}; }
static INLINE void store(float* p, Blocks f) { store(p, f.a), store(p + PAIR, f.b); }
