// Compares the CPU kernels with sums in float64 and prints the largest relative error. Every tensor lies
// against a page that must not be touched, once with its end and once with its start. Free of torch, to be
// built for other instruction sets.
#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <set>
#include <sys/mman.h>
#include <vector>

#include "../large_kernel_conv/cpu_kernels/digest.h"
#include "../large_kernel_conv/cpu_kernels/fft.h"
#include "../large_kernel_conv/cpu_kernels/kernels.h"
#include "../large_kernel_conv/cpu_kernels/memory.h"

using Values = std::vector<double>;

static size_t bytes_of(Type type) { return type == Type::float32 ? 4 : 2; }

constexpr size_t PAGE = 65536;  // the largest page size of the CPUs in question
constexpr char CANARY = 0x5a;

// Memory between two pages that must not be touched; what is left of its own pages holds canaries.
struct Guarded {
    size_t size, room;
    char *pages, *data;

    Guarded(size_t size, bool at_end) : size(size), room((size + PAGE - 1) / PAGE * PAGE) {
        const int access = PROT_READ | PROT_WRITE, kind = MAP_PRIVATE | MAP_ANONYMOUS;
        pages = (char*)mmap(nullptr, room + 2 * PAGE, access, kind, -1, 0);
        mprotect(pages, PAGE, PROT_NONE), mprotect(pages + PAGE + room, PAGE, PROT_NONE);
        data = pages + PAGE + (at_end ? room - size : 0);
        std::memset(pages + PAGE, CANARY, room);
    }
    Guarded(const Guarded&) = delete;
    ~Guarded() {
        for (char* p = pages + PAGE; p < pages + PAGE + room; p++)
            if ((p < data || p >= data + size) && *p != CANARY)
                fprintf(stderr, "written outside of a tensor\n"), abort();
        munmap(pages, room + 2 * PAGE);
    }
};

// One dense tensor in memory, read and written by index in NCHW order.
struct Tensor {
    Guarded data;
    Images images;
    long count;

    Tensor(long n, long c, long h, long w, Type type, bool channels_last, bool at_end)
        : data(n * c * h * w * bytes_of(type), at_end),
          images{data.data, type, c, h, w, channels_last},
          count(n * c * h * w) {}

    long place(long i) const {
        const long area = images.height * images.width, channels = images.channels;
        const long pixel = i % area, channel = i / area % channels;
        return images.channels_last ? (i - i % (area * channels)) + pixel * channels + channel : i;
    }
    double get(long i) const {
        if (images.type == Type::float32) return ((float*)data.data)[place(i)];
        const uint16_t bits = ((uint16_t*)data.data)[place(i)];
        if (images.type == Type::bfloat16) {
            const uint32_t wide = (uint32_t)bits << 16;
            float value;
            std::memcpy(&value, &wide, 4);
            return value;
        }
        const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
        const double magnitude =
            exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24);
        return bits >> 15 ? -magnitude : magnitude;
    }
    // Truncates to 16 bits: any value will do, so long as get() gives it back.
    void set(long i, double value) {
        if (images.type == Type::float32) {
            ((float*)data.data)[place(i)] = value;
        } else if (images.type == Type::bfloat16) {
            const float narrow = value;
            uint32_t bits;
            std::memcpy(&bits, &narrow, 4);
            ((uint16_t*)data.data)[place(i)] = bits >> 16;
        } else {
            int exponent;
            const double fraction = std::frexp(std::fabs(value), &exponent);  // 0.5 ... 1
            const int field = exponent + 14;
            const int normal = field << 10 | ((int)(fraction * 2048) & 1023);
            const int bits = field > 0 ? normal : (int)std::ldexp(std::fabs(value), 24);
            ((uint16_t*)data.data)[place(i)] = (value < 0) << 15 | bits;
        }
    }
    void fill(const Values& all) {
        for (long i = 0; i < count; i++) set(i, all[i]);
    }
    Values values() const {
        Values all(count);
        for (long i = 0; i < count; i++) all[i] = get(i);
        return all;
    }
};

static double error(const Values& found, const Values& expected) {
    double difference = 0, largest = 1e-30;
    for (size_t i = 0; i < expected.size(); i++) {
        if (!std::isfinite(found[i])) return INFINITY;  // comparisons would lose a NaN
        difference = std::fmax(difference, std::fabs(found[i] - expected[i]));
        largest = std::fmax(largest, std::fabs(expected[i]));
    }
    return difference / largest;
}

// What was left in memory must not matter: not even a NaN, times zero.
static void spoil_memory() {
    Buffer all{1 << 20};
    thread_arena().place({&all});
    std::fill_n(all.data, all.size, NAN);
}

using Shape = std::array<long, 5>;  // images, channels, height, width, kernel

// Drawn inputs, as their type holds them, and what the convolution makes of them.
struct Case {
    Shape shape;
    Type type;
    Values xs, gs, ws;
    std::vector<float> bias;
    Values y, grad_x, grad_weight;

    Case(Shape shape, Type type) : shape(shape), type(type) {
        const auto [n, c, h, w, k] = shape;
        std::mt19937 random(n + c + h + w + k);
        std::normal_distribution<double> normal;
        auto draw = [&](long n, long c, long h, long w) {
            Tensor t(n, c, h, w, type, false, false);
            for (long i = 0; i < t.count; i++) t.set(i, normal(random));
            return t.values();
        };
        xs = draw(n, c, h, w), gs = draw(n, c, h, w), ws = draw(1, c, k, k);
        bias.resize(c), y.resize(xs.size()), grad_x.resize(xs.size()), grad_weight.resize(ws.size());
        for (float& b : bias) b = normal(random);
        for (long i = 0; i < n * c; i++) {
            std::fill_n(&y[i * h * w], h * w, bias[i % c]);
            for (long p = 0; p < k; p++)
                for (long q = 0; q < k; q++) {
                    const long tap = (i % c * k + p) * k + q, down = p - k / 2, across = q - k / 2;
                    for (long a = std::max(0L, -down); a < std::min(h, h - down); a++)
                        for (long b = std::max(0L, -across); b < std::min(w, w - across); b++) {
                            const long out = (i * h + a) * w + b, in = out + down * w + across;
                            y[out] += xs[in] * ws[tap];
                            grad_x[in] += gs[out] * ws[tap], grad_weight[tap] += gs[out] * xs[in];
                        }
                }
        }
    }
};

// The largest error of the kernels.
static double check(const Case& expected, bool channels_last, bool at_end) {
    const auto [n, c, h, w, k] = expected.shape;
    const Type type = expected.type;
    Tensor x(n, c, h, w, type, channels_last, at_end), grad(n, c, h, w, type, !channels_last, at_end);
    Tensor weight(1, c, k, k, type, false, at_end);
    x.fill(expected.xs), grad.fill(expected.gs), weight.fill(expected.ws);
    const std::vector<float>& bias = expected.bias;
    Values y = expected.y;

    const Plan plan = make_plan(n, c, h, w, same_padding(k, k));
    const bool fft = plan.method == Method::fft;
    Tensor found_y(n, c, h, w, type, channels_last, at_end);
    Tensor found_grad_x(n, c, h, w, type, channels_last, at_end);
    const long parts = 2 < n ? 2 : n;
    Guarded sums_memory(parts * c * k * k * sizeof(float), at_end);
    float* sums = (float*)sums_memory.data;
    std::memset(sums, 0, sums_memory.size);
    std::unique_ptr<float[]> spectra(new float[plan.spectra_size()]);
    const long groups = plan.channel_groups(), tasks = groups * parts, fft_tasks = groups * n * plan.tiles();
    std::vector<Digest> digests;
    for (long group = 0; fft && group < groups; group++)
        digests.push_back(group_digest(plan, weight.images, group));
    std::atomic<bool> stale = false;
    const Spectra computed{spectra.get(), digests.data(), &stale};
    auto forward = [&](bool relu) {
        spoil_memory();
        const Images &in = x.images, &kernel = weight.images, &out = found_y.images;
        if (fft) fft_forward(plan, in, kernel, computed, bias.data(), relu, out, 0, fft_tasks);
        else direct_forward(plan, in, kernel, bias.data(), relu, out, parts, 0, tasks);
        return error(found_y.values(), y);
    };
    spoil_memory();
    if (fft) weight_spectra(plan, weight.images, spectra.get(), 0, groups);
    double y_error = forward(false);
    for (double& value : y) value = std::fmax(value, 0);
    y_error = std::fmax(y_error, forward(true));
    auto backward = [&] {
        spoil_memory();
        const Images &g = grad.images, &in = x.images, &kernel = weight.images, &out = found_grad_x.images;
        if (fft) fft_backward(plan, g, in, kernel, computed, out, sums, parts, 0, tasks);
        else direct_backward(plan, g, in, kernel, out, sums, parts, 0, tasks);
        return error(found_grad_x.values(), expected.grad_x);
    };
    double grad_x_error = backward();
    if (stale) return INFINITY;
    if (fft) {  // spectra of other weights
        spectra[0] = NAN, digests[0] = Digest(&plan, sizeof(plan));
        y_error = std::fmax(y_error, forward(true));
        if (!stale.exchange(false)) return INFINITY;
        grad_x_error = std::fmax(grad_x_error, backward());
        if (!stale) return INFINITY;
    }
    Values found_grad_weight(expected.ws.size());
    for (long i = 0; i < parts * c * k * k; i++) found_grad_weight[i % (c * k * k)] += sums[i];
    // a 16-bit result is right to its rounding: 2^-8 of a bfloat16, 2^-11 of a float16
    const double rounding = type == Type::float32 ? 1 : type == Type::bfloat16 ? 1e-6 * 256 : 1e-6 * 2048;
    const double grad_weight_error = error(found_grad_weight, expected.grad_weight);
    return std::fmax(grad_weight_error, std::fmax(y_error, grad_x_error) * rounding);
}

// Changes of memory that its digest does not show: of the highest bit of one byte, or of two that reach one
// word of the digest.
static long changes_missed() {
    long missed = 0;
    for (size_t size : {1, 2, 63, 512, 514, 1300, 4000}) {
        Guarded memory(size, true);
        std::fill_n(memory.data, size, 1);
        const Digest digest(memory.data, size);
        for (size_t i = 0; i < size; i++) {
            memory.data[i] ^= 0x80, missed += Digest(memory.data, size) == digest;
            for (size_t word = i / 8 * 8 + sizeof(digest); word < size; word += sizeof(digest))
                for (size_t j = word; j < std::min(size, word + 8); j++) {
                    memory.data[j] ^= 0x80, missed += Digest(memory.data, size) == digest;
                    memory.data[j] ^= 0x80;
                }
            memory.data[i] ^= 0x80;
        }
        missed += !(Digest(memory.data, size) == digest);
    }
    return missed;
}

// Runs that transforms of real sequences would leave, not asked for.
static long steps_left(const Transform& t) {
    std::vector<float> in(t.size * PAIR), spectra(t.size * PAIR), scratch(t.size * PAIR);
    Ahead forward{(const char*)in.data(), 0, 1, t.steps, 1, false}, inverse = forward;
    t.forward_real(in.data(), PAIR, t.size, spectra.data(), scratch.data(), &forward);
    t.inverse_real(spectra.data(), in.data(), PAIR, 0, t.size, scratch.data(), &inverse);
    return forward.runs + inverse.runs;
}

static std::vector<Shape> checked_shapes() {
    std::vector<Shape> shapes = {
        {2, 3, 56, 56, 31}, {1, 35, 28, 28, 29}, {3, 17, 14, 14, 27}, {2, 33, 7, 7, 13}, {1, 5, 1, 1, 3},
        {1, 2, 17, 23, 21}, {1, 3, 3, 70, 31}, {1, 2, 200, 20, 31}, {2, 40, 32, 32, 3}, {1, 9, 40, 9, 7},
        {1, 1, 9, 8, 31}, {1, 2, 100, 170, 51}, {3, 83, 7, 7, 13},
        // tiles whose pixels can be used in place
        {2, 2 * LANES + 1, 12, 170, 31}, {2, 2 * LANES + 1, 170, 12, 31}};
    // every transform there is, over rows and over columns, with both blocks of a group: length, the other
    // length, kernel
    const long lengths[][3] = {
        {4, 70, 31}, {5, 70, 31}, {6, 70, 31}, {10, 10, 13}, {12, 12, 13}, {14, 14, 11}, {16, 16, 15},
        {20, 20, 21}, {24, 24, 23}, {26, 26, 27}, {32, 32, 31}, {40, 40, 31}, {49, 12, 31}, {65, 12, 31},
        {81, 12, 31}, {85, 12, 31}, {97, 12, 31}, {105, 12, 31}, {113, 12, 31}, {129, 12, 31}, {145, 12, 31}};
    for (const auto& [length, other, kernel] : lengths) {
        shapes.push_back({1, LANES + 2, length, other, kernel});
        if (other != length) shapes.push_back({1, LANES + 2, other, length, kernel});
    }
    return shapes;
}

// Sums of many products, whose error must not grow with their number: over the pixels of a map, of many
// images, of narrow and of wide maps; over the taps of a kernel that no transform has room for.
constexpr Shape LONG_SUMS[] = {
    {2, 3, 256, 256, 3}, {2, 2, 117, 117, 7}, {300, 2, 28, 28, 3}, {150, 2, 14, 14, 13},
    {1, 2, 20000, 5, 3}, {1, 2, 12, 20000, 3}, {1, 1, 90, 90, 179}};

// Checks a shape in both memory formats; returns the largest error, and prints those beyond the bound.
static double check_formats(const Shape& s, Type type, double bound) {
    const Case expected(s, type);
    double worst = 0;
    for (int variant = 0; variant < 4; variant++) {
        const bool channels_last = variant & 1, at_end = variant & 2;
        const double e = check(expected, channels_last, at_end);
        if (!(e <= bound))
            printf("%ld x %ld x %ld x %ld, kernel %ld, type %d, channels_last %d: %.1e\n", s[0], s[1], s[2],
                   s[3], s[4], (int)type, channels_last, e);
        if (!(e <= worst)) worst = e;
    }
    return worst;
}

int main() {
    double worst = 0;
    bool failed = false;
    auto check_all = [&](const Shape& s, Type type, double bound) {
        const double e = check_formats(s, type, bound);
        if (!(e <= bound)) failed = true;
        if (!(e <= worst)) worst = e;
    };
    std::set<int> row_sizes, column_sizes;
    for (const Shape& s : checked_shapes()) {
        const Plan plan = make_plan(s[0], s[1], s[2], s[3], same_padding(s[4], s[4]));
        if (plan.method == Method::fft)
            row_sizes.insert(plan.row_transform->size), column_sizes.insert(plan.column_transform->size);
        for (Type type : {Type::float32, Type::bfloat16, Type::float16}) check_all(s, type, 2e-6);
    }
    for (const Shape& s : LONG_SUMS) check_all(s, Type::float32, 1e-6);
    if (long missed = changes_missed()) printf("%ld changes have no other digest\n", missed), failed = true;
    int number;
    const Transform* const* all = transforms(number);
    for (int i = 0; i < number; i++) {
        if (steps_left(*all[i]))
            printf("%d points ask for less than they should\n", all[i]->size), failed = true;
        for (const auto& [what, sizes] : {std::pair("rows", row_sizes), std::pair("columns", column_sizes)})
            if (!sizes.count(all[i]->size)) printf("no %s of %d points\n", what, all[i]->size), failed = true;
    }
    printf("%d lanes: largest relative error %.1e\n", LANES, worst);
    return failed;
}
