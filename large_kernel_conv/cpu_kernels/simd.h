// Vectors of LANES floats through the vector extensions of GCC and Clang: one source for AVX-512, AVX2 and
// NEON.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 64")
#endif
#define INLINE inline __attribute__((always_inline))

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
typedef uint16_t HalfBits __attribute__((vector_size(2 * LANES)));
// the same without a wish for alignment; aligned addresses cost nothing extra
typedef float LooseVec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t LooseHalfBits __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

static INLINE Vec load(const float* p) { return *(const LooseVec*)p; }
static INLINE void store(float* p, Vec v) { *(LooseVec*)p = v; }
static INLINE Vec splat(float f) { return f - Vec{}; }
static INLINE Vec at_least(Vec v, Vec floor) { return v < floor ? floor : v; }  // NaN stays NaN

// Keeps a loaded value in a register: else GCC loads it again for each multiplication that uses it.
static INLINE Vec in_register(Vec v) {
#if defined(__AVX512F__)
    asm("" : "+v"(v));
#elif defined(__x86_64__)
    asm("" : "+x"(v));
#elif defined(__aarch64__)
    asm("" : "+w"(v));
#endif
    return v;
}

// A vector of complex numbers; in memory the real parts, then the imaginary ones.
struct Complex {
    Vec re, im;
};
constexpr int PAIR = 2 * LANES;  // floats in one Complex

static INLINE Complex operator+(Complex a, Complex b) { return {a.re + b.re, a.im + b.im}; }
static INLINE Complex operator-(Complex a, Complex b) { return {a.re - b.re, a.im - b.im}; }
static INLINE Complex plus_i(Complex a, Complex b) { return {a.re - b.im, a.im + b.re}; }   // a + i b
static INLINE Complex minus_i(Complex a, Complex b) { return {a.re + b.im, a.im - b.re}; }  // a - i b
static INLINE Complex product(Complex a, Complex b) {
    return {a.re * b.re - a.im * b.im, a.im * b.re + a.re * b.im};
}
static INLINE Complex product_conjugate(Complex a, Complex b) {  // a conj(b)
    return {a.re * b.re + a.im * b.im, a.im * b.re - a.re * b.im};
}
static INLINE Complex scaled(Complex a, Vec s) { return {a.re * s, a.im * s}; }
static INLINE Complex splat(float re, float im) { return {splat(re), splat(im)}; }
static INLINE Complex load_complex(const float* p) { return {load(p), load(p + LANES)}; }
static INLINE void store(float* p, Complex a) { store(p, a.re), store(p + LANES, a.im); }

// Number types in tensors. float16 and bfloat16 are converted by their bits, which needs no instruction of a
// particular CPU.
struct BFloat16 { uint16_t bits; };
struct Float16 { uint16_t bits; };

static INLINE Vec load_as_float(const float* p) { return load(p); }
static INLINE void store_from_float(float* p, Vec v) { store(p, v); }

static INLINE Vec load_as_float(const BFloat16* p) {
    return (Vec)(__builtin_convertvector((HalfBits)*(const LooseHalfBits*)p, Bits) << 16);
}
static INLINE void store_from_float(BFloat16* p, Vec v) {
    Bits bits = (Bits)v;
    Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
    *(LooseHalfBits*)p = __builtin_convertvector(v == v ? rounded : Bits{} + 0x7fc0, HalfBits);
}

static INLINE Vec load_as_float(const Float16* p) {
    Bits half = __builtin_convertvector((HalfBits)*(const LooseHalfBits*)p, Bits);
    Bits magnitude = (half & 0x7fff) << 13;
    // moves the exponent's bias from 15 to 127, subnormal numbers too
    Bits finite = (Bits)((Vec)magnitude * 0x1p112f);
    return (Vec)((magnitude >= 0x0f800000 ? magnitude | 0x7f800000 : finite) | (half & 0x8000) << 16);
}
static INLINE void store_from_float(Float16* p, Vec v) {
    Bits sign = (Bits)v >> 16 & 0x8000, magnitude = (Bits)v & 0x7fffffff;
    Bits normal = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
    // one unit of 0.5f's last place is float16's smallest number
    Bits subnormal = (Bits)((Vec)magnitude + 0.5f) - 0x3f000000;
    Bits finite = magnitude < 0x38800000 ? subnormal : normal;    // 2^-14
    Bits special = magnitude > 0x7f800000 ? Bits{} + 0x7e00 : Bits{} + 0x7c00;
    Bits rounded = magnitude >= 0x477ff000 ? special : finite;  // 65520
    *(LooseHalfBits*)p = __builtin_convertvector(sign | rounded, HalfBits);
}

template <int... INDEX>
static INLINE Vec shuffle(Vec a, Vec b) {
#if defined(__clang__) || __GNUC__ >= 12
    return __builtin_shufflevector(a, b, INDEX...);
#else
    typedef int Indices __attribute__((vector_size(4 * LANES)));
    return __builtin_shuffle(a, b, Indices{INDEX...});
#endif
}

// Swaps the entries of a in lanes with bit D set with those of b in the lanes without it.
template <int D, int... LANE>
static INLINE void exchange(Vec& a, Vec& b, std::integer_sequence<int, LANE...>) {
    Vec low = shuffle<(LANE & D ? LANES + LANE - D : LANE)...>(a, b);
    b = shuffle<(LANE & D ? LANES + LANE : LANE + D)...>(a, b);
    a = low;
}

template <int D>
static INLINE void transpose_from(Vec* rows) {
    UNROLL for (int i = 0; i < LANES; i++)
        if (!(i & D)) exchange<D>(rows[i], rows[i | D], std::make_integer_sequence<int, LANES>());
    if constexpr (D > 1) transpose_from<D / 2>(rows);
}

// Transposes LANES vectors in place.
static INLINE void transpose(Vec* rows) { transpose_from<LANES / 2>(rows); }
