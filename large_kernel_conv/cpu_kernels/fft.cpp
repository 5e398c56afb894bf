// A transform of A * B points is A-point transforms, twiddle factors, and B-point transforms (Cooley and Tukey, decimation in
// frequency). The result is left in the order in which it falls out; the inverse starts from that order and walks back. Where
// B-point transforms are short, a convolution multiplies between them, a part of the sequence at a time.
#include "fft.h"

#include <cmath>

#include "blocks.h"

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
            Complex even = first, odd{};
            UNROLL for (int j = 1; j <= H; j++) {
                Vec cos = splat(ROOTS<N>.cos[j * k % N]), sin = splat(ROOTS<N>.sin[j * k % N]);
                even.re += sum[j - 1].re * cos, even.im += sum[j - 1].im * cos;
                odd.re += difference[j - 1].re * sin, odd.im += difference[j - 1].im * sin;
            }
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
        Complex table[P][Q];
        UNROLL for (int a = 0; a < P; a++) {
            UNROLL for (int b = 0; b < Q; b++) table[a][b] = v[P * b + a];
            Dft<Q>::run(table[a]);
            UNROLL for (int b = 1; b < Q; b++)
                if (a) table[a][b] = product_conjugate(table[a][b], splat(ROOTS<P * Q>.cos[a * b], ROOTS<P * Q>.sin[a * b]));
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
struct Dft<9> : Composite<3, 3> {};
template <>
struct Dft<16> : Composite<4, 4> {};

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

alignas(64) const float ZEROS[PAIR] = {};

INLINE Complex swapped(Complex a) { return {a.im, a.re}; }

template <int A, int B>
struct Passes : Transform {
    static constexpr int S = A * B;
    int positions[S], mirrors[S];
    float cos[B][A], sin[B][A];

    Passes() {
        for (int k = 0; k < S; k++) positions[k] = k % A * B + k / A;
        for (int k = 0; k < S; k++) mirrors[positions[k]] = positions[(S - k) % S];
        for (int n = 0; n < B; n++)
            for (int k = 0; k < A; k++) cos[n][k] = std::cos(2 * PI * n * k / S), sin[n][k] = std::sin(2 * PI * n * k / S);
        size = S, position = positions, mirror = mirrors;
        cost = B * Dft<A>::COST + A * Dft<B>::COST + 4 * (A - 1) * (B - 1) + 8 * S;
    }

    // A-point transforms of the elements n, n + B, n + 2 B, ...: their k-th coefficients become the k-th part, B elements.
    INLINE void split(const float* in, long in_stride, int count, float* parts) const {
        for (int n = 0; n < B; n++) {
            Complex v[A];
            UNROLL for (int j = 0; j < A; j++) v[j] = load_complex(n + B * j < count ? in + (n + B * j) * in_stride : ZEROS);
            Dft<A>::run(v);
            store(parts + n * PAIR, v[0]);
            UNROLL for (int k = 1; k < A; k++)
                store(parts + (n + B * k) * PAIR, product_conjugate(v[k], splat(cos[n][k], sin[n][k])));
        }
    }
    // The inverse of split. A forward transform with real and imaginary parts swapped before and after is an inverse one.
    INLINE void join(const float* parts, float* out, long out_stride, int count) const {
        for (int n = 0; n < B; n++) {
            Complex v[A];
            v[0] = swapped(load_complex(parts + n * PAIR));
            UNROLL for (int k = 1; k < A; k++) {
                v[k] = swapped(product(load_complex(parts + (n + B * k) * PAIR), splat(cos[n][k], sin[n][k])));
                // else GCC takes products apart to fuse them with the additions behind them, and needs more instructions
                v[k] = {in_register(v[k].re), in_register(v[k].im)};
            }
            Dft<A>::run(v);
            UNROLL for (int j = 0; j < A; j++)
                if (n + B * j < count) store(out + (n + B * j) * out_stride, swapped(v[j]));
        }
    }

    // B-point transforms of a part.
    static INLINE void transform_part(const float* part, Complex* v) {
        UNROLL for (int j = 0; j < B; j++) v[j] = load_complex(part + j * PAIR);
        Dft<B>::run(v);
    }
    static INLINE void store_swapped(const Complex* v, float* part) {
        UNROLL for (int j = 0; j < B; j++) store(part + j * PAIR, swapped(v[j]));
    }

    void forward(const float* in, long in_stride, int count, float* out, long out_stride, float* scratch) const override {
        split(in, in_stride, count, scratch);
        for (int k = 0; k < A; k++) {
            Complex v[B];
            transform_part(scratch + k * B * PAIR, v);
            UNROLL for (int j = 0; j < B; j++) store(out + (k * B + j) * out_stride, v[j]);
        }
    }

    void inverse(const float* in, long in_stride, float* out, long out_stride, int count, float* scratch) const override {
        for (int k = 0; k < A; k++) {
            Complex v[B];
            UNROLL for (int j = 0; j < B; j++) v[j] = swapped(load_complex(in + (k * B + j) * in_stride));
            Dft<B>::run(v);
            store_swapped(v, scratch + k * B * PAIR);
        }
        join(scratch, out, out_stride, count);
    }

    bool convolve(float* column, float* mirrored, long stride, int count, int wanted, const float* factors,
                  float* const scratch[2]) const override {
        if constexpr (B > 7) return false;  // convolve_parts would need too many registers
        else {
            float *parts = scratch[0], *mirrored_parts = scratch[1];
            split(column, stride, count, parts);
            split(mirrored, stride, count, mirrored_parts);
            convolve_parts<true>(parts, mirrored_parts, factors);
            for (int k = 1; k < A; k++)
                convolve_parts<false>(parts + k * B * PAIR, mirrored_parts + (A - k) * B * PAIR, factors + k * B * FREQUENCY);
            join(parts, column, stride, wanted);
            join(mirrored_parts, mirrored, stride, wanted);
            return true;
        }
    }

    // Part k of a column and part A - k of the mirrored one; FIRST: part 0 of both. Element j is the frequency k + A j, whose
    // mirror (A - k) + A (B - 1 - j) is the element B - 1 - j; in part 0 it is A (B - j), the element B - j.
    template <bool FIRST>
    static INLINE void convolve_parts(float* part, float* mirrored_part, const float* factors) {
        Complex v[B];
        transform_part(part, v);
        UNROLL for (int j = 0; j < B; j++) store(part + j * PAIR, v[j]);
        asm volatile("" ::: "memory");  // else GCC keeps this part in registers too, and spills both
        transform_part(mirrored_part, v);
        UNROLL for (int j = 0; j < B; j++) {
            Complex& mirrored = v[FIRST ? (B - j) % B : B - 1 - j];
            Complex z = load_complex(part + j * PAIR);
            put_together(product(take_apart(z, mirrored), load_blocks(factors + j * FREQUENCY)), z, mirrored);
            store(part + j * PAIR, swapped(z));
            mirrored = swapped(mirrored);  // for the inverse
        }
        Dft<B>::run(v);
        store_swapped(v, mirrored_part);
        transform_part(part, v);
        store_swapped(v, part);
    }
};

template <class T>
const Transform* made() {
    static const T transform;
    return &transform;
}

}  // namespace

const Transform* const* transforms(int& number) {
    // up to 56 points B is at most 7, as convolve asks
    static const Transform* const all[] = {
        made<Passes<2, 4>>(), made<Passes<2, 5>>(), made<Passes<3, 4>>(), made<Passes<4, 4>>(), made<Passes<3, 6>>(),
        made<Passes<4, 5>>(), made<Passes<4, 6>>(), made<Passes<4, 7>>(), made<Passes<8, 4>>(), made<Passes<6, 6>>(),
        made<Passes<8, 5>>(), made<Passes<6, 7>>(), made<Passes<8, 6>>(), made<Passes<8, 7>>(), made<Passes<8, 8>>(),
        made<Passes<7, 10>>(), made<Passes<8, 9>>(), made<Passes<8, 10>>(), made<Passes<8, 12>>(), made<Passes<10, 10>>(),
        made<Passes<8, 14>>(), made<Passes<10, 12>>(), made<Passes<8, 16>>(), made<Passes<12, 12>>(), made<Passes<10, 16>>(),
    };
    number = sizeof(all) / sizeof(all[0]);
    return all;
}
