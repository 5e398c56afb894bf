// A transform of A * B points is A-point transforms, twiddle factors, and B-point transforms (Cooley and
// Tukey, decimation in frequency). The result is left in the order in which it falls out; the inverse starts
// from that order and walks back.
#include "fft.h"

#include <cmath>

namespace {

constexpr double PI = 3.14159265358979323846;

// std::cos and std::sin are not constexpr; |x| <= pi here
constexpr double taylor(double x, double term, int n) {
    double sum = term;
    for (; n < 40; n += 2) sum += term *= -x * x / (n * (n + 1));
    return sum;
}
constexpr double constexpr_cos(double x) { return taylor(x, 1, 1); }
constexpr double constexpr_sin(double x) { return taylor(x, x, 2); }

template <int N>
struct UnitRoots {  // cos and sin of 2 pi j / N
    float cos[N], sin[N];
    constexpr UnitRoots() : cos(), sin() {
        for (int j = 0; j < N; j++) {
            double angle = 2 * PI * (2 * j > N ? j - N : j) / N;
            cos[j] = (float)constexpr_cos(angle), sin[j] = (float)constexpr_sin(angle);
        }
    }
};
template <int N>
constexpr UnitRoots<N> ROOTS{};

// Dft<N>::run: N points in place, in registers. Dft<N>::COST: its vector instructions.
template <int N>
struct Dft {  // odd N: pairs j, N - j share their products
    static constexpr int H = N / 2, COST = 4 * H * H + 10 * H;
    static INLINE void run(Complex* v) {
        Complex first = v[0], total = v[0], sum[H], difference[H];
        UNROLL for (int j = 0; j < H; j++) {
            sum[j] = v[j + 1] + v[N - 1 - j], difference[j] = v[j + 1] - v[N - 1 - j];
            total = total + sum[j];
        }
        v[0] = total;
        UNROLL for (int k = 1; k <= H; k++) {
            Complex even = first, odd = scaled(difference[0], splat(ROOTS<N>.sin[k]));
            UNROLL for (int j = 1; j <= H; j++)
                even = even + scaled(sum[j - 1], splat(ROOTS<N>.cos[j * k % N]));
            UNROLL for (int j = 2; j <= H; j++)
                odd = odd + scaled(difference[j - 1], splat(ROOTS<N>.sin[j * k % N]));
            v[k] = minus_i(even, odd), v[N - k] = plus_i(even, odd);
        }
    }
};

template <>
struct Dft<2> {
    static constexpr int COST = 4;
    static INLINE void run(Complex* v) {
        Complex a = v[0], b = v[1];
        v[0] = a + b, v[1] = a - b;
    }
};

template <>
struct Dft<4> {
    static constexpr int COST = 16;
    static INLINE void run(Complex* v) {
        Complex a = v[0] + v[2], b = v[0] - v[2], c = v[1] + v[3], d = v[1] - v[3];
        v[0] = a + c, v[1] = minus_i(b, d), v[2] = a - c, v[3] = plus_i(b, d);
    }
};

template <>
struct Dft<8> {
    static constexpr int COST = 56;
    static INLINE void run(Complex* v) {
        Complex even[4], odd[4];
        UNROLL for (int j = 0; j < 4; j++) even[j] = v[j] + v[j + 4], odd[j] = v[j] - v[j + 4];
        Vec h = splat(0.70710678118654752f);
        Complex a = {(odd[1].re + odd[1].im) * h, (odd[1].im - odd[1].re) * h};   // times exp(-i pi / 4)
        Complex b = {(odd[3].im - odd[3].re) * h, -(odd[3].re + odd[3].im) * h};  // times exp(-3 i pi / 4)
        Complex p = minus_i(odd[0], odd[2]), q = plus_i(odd[0], odd[2]), c = a + b, d = a - b;
        v[1] = p + c, v[5] = p - c, v[3] = minus_i(q, d), v[7] = plus_i(q, d);
        Dft<4>::run(even);
        UNROLL for (int j = 0; j < 4; j++) v[2 * j] = even[j];
    }
};

template <int P, int Q>
struct Composite {  // P * Q points through a table of P x Q with twiddle factors
    static constexpr int COST = P * Dft<Q>::COST + Q * Dft<P>::COST + 4 * (P - 1) * (Q - 1);
    static INLINE void run(Complex* v) {
        constexpr auto& W = ROOTS<P * Q>;
        Complex table[P][Q];
        UNROLL for (int a = 0; a < P; a++) {
            UNROLL for (int b = 0; b < Q; b++) table[a][b] = v[P * b + a];
            Dft<Q>::run(table[a]);
            UNROLL for (int b = 1; b < Q; b++)
                if (a) table[a][b] = product_conjugate(table[a][b], splat(W.cos[a * b], W.sin[a * b]));
        }
        UNROLL for (int b = 0; b < Q; b++) {
            Complex column[P];
            UNROLL for (int a = 0; a < P; a++) column[a] = table[a][b];
            Dft<P>::run(column);
            UNROLL for (int a = 0; a < P; a++) v[b + Q * a] = column[a];
        }
    }
};
template <>
struct Dft<16> : Composite<8, 2> {};

template <int P, int Q>
struct PrimeFactor {  // P * Q points, P and Q without a common divisor: no twiddle factors (Good and Thomas)
    static constexpr int N = P * Q, COST = P * Dft<Q>::COST + Q * Dft<P>::COST;
    static constexpr int inverse(int a, int m) {
        int i = 1;
        while (a * i % m != 1) i++;
        return i;
    }
    static INLINE void run(Complex* v) {
        constexpr int P_STEP = Q * inverse(Q, P), Q_STEP = P * inverse(P, Q);
        Complex table[P][Q];
        UNROLL for (int a = 0; a < P; a++) {
            UNROLL for (int b = 0; b < Q; b++) table[a][b] = v[(Q * a + P * b) % N];
            Dft<Q>::run(table[a]);
        }
        UNROLL for (int b = 0; b < Q; b++) {
            Complex column[P];
            UNROLL for (int a = 0; a < P; a++) column[a] = table[a][b];
            Dft<P>::run(column);
            UNROLL for (int a = 0; a < P; a++) v[(P_STEP * a + Q_STEP * b) % N] = column[a];
        }
    }
};
template <>
struct Dft<6> : PrimeFactor<2, 3> {};
template <>
struct Dft<10> : PrimeFactor<2, 5> {};
template <>
struct Dft<12> : PrimeFactor<4, 3> {};
template <>
struct Dft<14> : PrimeFactor<2, 7> {};
template <>
struct Dft<15> : PrimeFactor<3, 5> {};

alignas(64) const float ZEROS[PAIR] = {};

INLINE Complex swapped(Complex a) { return {a.im, a.re}; }

template <int A, int B>
struct Passes : Transform {
    static constexpr int S = A * B;
    static_assert(S % 2 == 0);
    // Whether a column, its parts and its factors fit a first cache of 48 KiB. Where they do not, loads and
    // stores take longer.
    static constexpr bool FIT_FIRST_CACHE = 3 * S * PAIR * sizeof(float) <= 48 << 10;
    static constexpr int LOADS_AND_STORES = FIT_FIRST_CACHE ? 8 : 12;
    float cos[B][A], sin[B][A];

    Passes() {
        for (int n = 0; n < B; n++)
            for (int k = 0; k < A; k++)
                cos[n][k] = std::cos(2 * PI * n * k / S), sin[n][k] = std::sin(2 * PI * n * k / S);
        size = S, steps = B + (A - 1) / 2 * 2;
        cost = B * Dft<A>::COST + A * Dft<B>::COST + 4 * (A - 1) * (B - 1) + LOADS_AND_STORES * S;
    }

    // A-point transforms of the elements n, n + B, n + 2 B, ...: their k-th coefficients become the k-th
    // part, B elements.
    template <class F>
    INLINE void split(const float* in, long stride, int count, float* parts, F meanwhile) const {
        for (int n = 0; n < B; n++) {
            meanwhile(n);
            Complex v[A];
            UNROLL for (int j = 0; j < A; j++)
                v[j] = load_complex(n + B * j < count ? in + (n + B * j) * stride : ZEROS);
            Dft<A>::run(v);
            store(parts + n * PAIR, v[0]);
            UNROLL for (int k = 1; k < A; k++)
                store(parts + (n + B * k) * PAIR, product_conjugate(v[k], splat(cos[n][k], sin[n][k])));
        }
    }
    // The inverse of split, of parts with real and imaginary parts swapped: a forward transform of those is
    // an inverse one.
    template <class F>
    INLINE void join(const float* parts, float* out, long stride, int first, int count, F meanwhile) const {
        for (int n = 0; n < B; n++) {
            meanwhile(n);
            Complex v[A];
            v[0] = load_complex(parts + n * PAIR);
            UNROLL for (int k = 1; k < A; k++) {
                const Complex part = load_complex(parts + (n + B * k) * PAIR);
                v[k] = product_conjugate(part, splat(cos[n][k], sin[n][k]));
                // else GCC takes products apart to fuse them with the additions behind them, and needs more
                // instructions
                v[k] = {in_register(v[k].re), in_register(v[k].im)};
            }
            Dft<A>::run(v);
            UNROLL for (int j = 0; j < A; j++)
                if (n + B * j >= first && n + B * j < count) store(out + (n + B * j) * stride, swapped(v[j]));
        }
    }

    // B-point transforms of a part.
    static INLINE void load_part(const float* part, Complex* v) {
        UNROLL for (int j = 0; j < B; j++) v[j] = load_complex(part + j * PAIR);
    }
    static INLINE void transform_to(Complex* v, float* part) {
        Dft<B>::run(v);
        UNROLL for (int j = 0; j < B; j++) store(part + j * PAIR, v[j]);
    }
    static INLINE void transform_part(const float* from, float* to) {
        Complex v[B];
        load_part(from, v);
        transform_to(v, to);
    }

    void forward(const float* in, long stride, int count, float* coefficients,
                 float* scratch) const override {
        split(in, stride, count, scratch, [](int) {});
        for (int k = 0; k < A; k++) transform_part(scratch + k * B * PAIR, coefficients + k * B * PAIR);
    }

    void inverse(const float* coefficients, float* out, long stride, int count,
                 float* scratch) const override {
        for (int k = 0; k < A; k++) {
            Complex v[B];
            UNROLL for (int j = 0; j < B; j++)
                v[j] = swapped(load_complex(coefficients + (k * B + j) * PAIR));
            transform_to(v, scratch + k * B * PAIR);
        }
        join(scratch, out, stride, 0, count, [&](int n) { ask_for_next(out, stride, count, n); });
    }

    void convolve(float* column, long stride, int count, int wanted, const float* factors,
                  float* scratch) const override {
        split(column, stride, count, scratch, [&](int n) {
            UNROLL for (int j = 0; j < A; j++) prefetch_complex(factors + (n * A + j) * PAIR);
        });
        for (int k = 0; k < A; k++) {
            Complex v[B];
            load_part(scratch + k * B * PAIR, v);
            Dft<B>::run(v);
            UNROLL for (int j = 0; j < B; j++)
                v[j] = swapped(product(v[j], load_complex(factors + (k * B + j) * PAIR)));
            transform_to(v, scratch + k * B * PAIR);
        }
        join(scratch, column, stride, 0, wanted, [&](int n) { ask_for_next(column, stride, count, n); });
    }

    // Asks for the elements n, n + B, n + 2 B, ... of the next column of a map, where the cache has room for
    // them.
    static INLINE void ask_for_next(const float* column, long stride, int count, int n) {
        if constexpr (FIT_FIRST_CACHE) {
            UNROLL for (int j = 0; j < A; j++)
                if (n + B * j < count) prefetch_complex(column + (n + B * j) * stride + PAIR);
        }
    }

    // Element j of part k is the frequency k + A j. Its mirror lies in part A - k, as element B - 1 - j; in
    // part 0, as B - j. The spectrum Z of a + i b holds A = (Z(k) + conj Z(-k)) / 2 and B = (Z(k) - conj
    // Z(-k)) / 2i; twice that is stored.
    void forward_real(const float* in, long stride, int count, float* spectra, float* scratch,
                      Ahead* ahead) const override {
        auto take_apart = [&](int k, Complex z, Complex mirrored) {
            store(spectra + (PACKED - 1 + k) * PAIR, {z.re + mirrored.re, z.im - mirrored.im});
            store(spectra + (S / 2 + k) * PAIR, {z.im + mirrored.im, mirrored.re - z.re});
        };
        split(in, stride, count, scratch, [&](int) { step(ahead); });
        Complex v[B];
        load_part(scratch, v);
        Dft<B>::run(v);
        store(spectra, v[0]);
        if (B % 2 == 0) store(spectra + PAIR, v[B / 2]);
        UNROLL for (int j = 1; 2 * j < B; j++) take_apart(A * j, v[j], v[B - j]);
        for (int k = 1; 2 * k < A; k++) {
            step(ahead), step(ahead);
            float* part = scratch + k * B * PAIR;
            transform_part(part, part);
            asm volatile("" ::: "memory");  // else GCC keeps this part in registers too, and spills both
            load_part(scratch + (A - k) * B * PAIR, v);
            Dft<B>::run(v);
            UNROLL for (int j = 0; j < B; j++) {
                const Complex z = load_complex(part + j * PAIR), mirrored = v[B - 1 - j];
                if (2 * j < B) take_apart(k + A * j, z, mirrored);
                else take_apart(A - k + A * (B - 1 - j), mirrored, z);
            }
        }
        if (A % 2) return;
        load_part(scratch + A / 2 * B * PAIR, v);
        Dft<B>::run(v);
        if (B % 2) store(spectra + PAIR, v[B / 2]);
        UNROLL for (int j = 0; 2 * j < B - 1; j++) take_apart(A / 2 + A * j, v[j], v[B - 1 - j]);
    }

    void inverse_real(const float* spectra, float* out, long stride, int first, int count, float* scratch,
                      Ahead* ahead) const override {
        auto put_together = [&](int k, Complex& z, Complex& mirrored) {  // swapped, for the inverse
            const Complex a = load_complex(spectra + (PACKED - 1 + k) * PAIR);
            const Complex b = load_complex(spectra + (S / 2 + k) * PAIR);
            z = {a.im + b.re, a.re - b.im}, mirrored = {b.re - a.im, a.re + b.im};
        };
        Complex v[B], mirrored;
        v[0] = swapped(load_complex(spectra));
        if (B % 2 == 0) v[B / 2] = swapped(load_complex(spectra + PAIR));
        UNROLL for (int j = 1; 2 * j < B; j++) put_together(A * j, v[j], v[B - j]);
        transform_to(v, scratch);
        for (int k = 1; 2 * k < A; k++) {
            step(ahead), step(ahead);
            float* mirrored_part = scratch + (A - k) * B * PAIR;
            UNROLL for (int j = 0; j < B; j++) {
                if (2 * j < B) put_together(k + A * j, v[j], mirrored);
                else put_together(A - k + A * (B - 1 - j), mirrored, v[j]);
                store(mirrored_part + (B - 1 - j) * PAIR, mirrored);
            }
            transform_to(v, scratch + k * B * PAIR);
            transform_part(mirrored_part, mirrored_part);
        }
        if (A % 2 == 0) {
            if (B % 2) v[B / 2] = swapped(load_complex(spectra + PAIR));
            UNROLL for (int j = 0; 2 * j < B - 1; j++) put_together(A / 2 + A * j, v[j], v[B - 1 - j]);
            transform_to(v, scratch + A / 2 * B * PAIR);
        }
        join(scratch, out, stride, first, count, [&](int) { step(ahead); });
    }
};

template <class T>
const Transform* made() {
    static const T transform;
    return &transform;
}

}  // namespace

const Transform* const* transforms(int& number) {
    static const Transform* const all[] = {
        made<Passes<2, 4>>(), made<Passes<2, 5>>(), made<Passes<3, 4>>(), made<Passes<4, 4>>(),
        made<Passes<3, 6>>(), made<Passes<4, 5>>(), made<Passes<4, 6>>(), made<Passes<4, 7>>(),
        made<Passes<8, 4>>(), made<Passes<6, 6>>(), made<Passes<8, 5>>(), made<Passes<6, 7>>(),
        made<Passes<8, 6>>(), made<Passes<8, 7>>(), made<Passes<8, 8>>(), made<Passes<6, 12>>(),
        made<Passes<8, 10>>(), made<Passes<8, 12>>(), made<Passes<10, 10>>(), made<Passes<8, 14>>(),
        made<Passes<8, 15>>(), made<Passes<8, 16>>(), made<Passes<12, 12>>(), made<Passes<10, 16>>(),
    };
    number = sizeof(all) / sizeof(all[0]);
    return all;
}
