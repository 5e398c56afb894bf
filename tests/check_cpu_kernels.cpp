// Compares the CPU kernels with sums in float64 and prints the largest relative error. Every tensor lies
// against a page that must not be touched, once with its end and once with its start. Free of torch, to be
// built for other instruction sets.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
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

struct Shape {
    long images, channels;
    Geometry geometry;
    long in_area() const { return geometry.vertical.inputs * geometry.horizontal.inputs; }
    long out_area() const { return geometry.vertical.outputs * geometry.horizontal.outputs; }
};

static Axis axis(long inputs, long taps, long before, long after, long dilation) {
    return {inputs, inputs + before + after - (taps - 1) * dilation, taps, before, dilation};
}
static Axis same(long inputs, long taps, long dilation = 1) {
    return axis(inputs, taps, taps / 2 * dilation, (taps - 1) / 2 * dilation, dilation);
}
static Shape square(long n, long c, long h, long w, long k) { return {n, c, {same(h, k), same(w, k)}}; }

// Drawn inputs, as their type holds them, and what the convolution makes of them.
struct Case {
    Shape shape;
    Type type;
    Values xs, gs, ws;
    std::vector<float> bias;
    Values y, grad_x, grad_weight;

    Case(Shape shape, Type type) : shape(shape), type(type) {
        const auto [n, c, g] = shape;
        const Axis &v = g.vertical, &h = g.horizontal;
        std::mt19937 random(n + c + v.inputs + h.inputs + g.taps());
        std::normal_distribution<double> normal;
        auto draw = [&](long n, long height, long width) {
            Tensor t(n, c, height, width, type, false, false);
            for (long i = 0; i < t.count; i++) t.set(i, normal(random));
            return t.values();
        };
        xs = draw(n, v.inputs, h.inputs), gs = draw(n, v.outputs, h.outputs), ws = draw(1, v.taps, h.taps);
        bias.resize(c), y.resize(gs.size()), grad_x.resize(xs.size()), grad_weight.resize(ws.size());
        for (float& b : bias) b = normal(random);
        for (long i = 0; i < n * c; i++) {
            std::fill_n(&y[i * shape.out_area()], shape.out_area(), bias[i % c]);
            for (long p = 0; p < v.taps; p++)
                for (long q = 0; q < h.taps; q++) {
                    const long tap = (i % c * v.taps + p) * h.taps + q;
                    const long down = p * v.dilation - v.padding, across = q * h.dilation - h.padding;
                    for (long a = std::max(0L, -down); a < std::min(v.outputs, v.inputs - down); a++)
                        for (long b = std::max(0L, -across); b < std::min(h.outputs, h.inputs - across); b++) {
                            const long out = (i * v.outputs + a) * h.outputs + b;
                            const long in = (i * v.inputs + a + down) * h.inputs + b + across;
                            y[out] += xs[in] * ws[tap];
                            grad_x[in] += gs[out] * ws[tap], grad_weight[tap] += gs[out] * xs[in];
                        }
                }
        }
    }
};

// The spectra of a weight, computed before; spoilt, to be noticed, where asked.
struct Computed {
    std::unique_ptr<float[]> values;
    std::vector<Digest> digests;
    std::atomic<bool> stale = false;

    Computed(const Plan& plan, const Images& weight, bool spoilt) : values(new float[plan.spectra_size()]) {
        if (plan.method == Method::direct) return;
        const long groups = plan.channel_groups();
        weight_spectra(plan, weight, values.get(), 0, groups);
        for (long group = 0; group < groups; group++) digests.push_back(group_digest(plan, weight, group));
        if (spoilt) values[0] = NAN, digests[0] = Digest(&plan, sizeof(plan));
    }
    Spectra spectra() { return {values.get(), digests.data(), &stale}; }
};

// The largest error of the kernels.
static double check(const Case& expected, bool channels_last, bool at_end) {
    const auto [n, c, geometry] = expected.shape;
    const Axis &v = geometry.vertical, &h = geometry.horizontal;
    const Type type = expected.type;
    Tensor x(n, c, v.inputs, h.inputs, type, channels_last, at_end);
    Tensor grad(n, c, v.outputs, h.outputs, type, !channels_last, at_end);
    Tensor weight(1, c, v.taps, h.taps, type, false, at_end);
    x.fill(expected.xs), grad.fill(expected.gs), weight.fill(expected.ws);
    const Images &in = x.images, &g = grad.images, &kernel = weight.images;
    const Plan plan = make_plan(n, c, geometry, Pass::forward);
    const Plan backward_plan = make_plan(n, c, geometry, Pass::backward);
    const long parts = 2 < n ? 2 : n, taps = c * geometry.taps();
    Guarded sums_memory(parts * taps * sizeof(float), at_end);
    float* sums = (float*)sums_memory.data;
    double y_error = 0, grad_x_error = 0, grad_weight_error = 0;

    auto forward = [&](bool relu, bool spoilt) {
        Tensor found(n, c, v.outputs, h.outputs, type, channels_last, at_end);
        spoil_memory();
        Computed computed(plan, kernel, spoilt);
        spoil_memory();
        convolve(plan, in, kernel, computed.spectra(), expected.bias.data(), relu, found.images, parts, 0,
                 convolve_tasks(plan, parts));
        if (computed.stale != (spoilt && plan.method != Method::direct)) y_error = INFINITY;
        Values wanted = expected.y;
        for (double& value : wanted) value = relu ? std::fmax(value, 0) : value;
        y_error = std::fmax(y_error, error(found.values(), wanted));
    };
    auto backward = [&](bool want_x, bool want_weight, bool spoilt) {
        Tensor found(n, c, v.inputs, h.inputs, type, channels_last, at_end);
        Images out = found.images;
        if (!want_x) out.data = nullptr;
        std::memset(sums, 0, sums_memory.size);
        spoil_memory();
        Computed computed(backward_plan, kernel, spoilt);
        spoil_memory();
        convolve_backward(backward_plan, g, in, kernel, computed.spectra(), out,
                          want_weight ? sums : nullptr, parts, 0, backward_plan.channel_groups() * parts);
        if (computed.stale != (want_x && spoilt && backward_plan.method != Method::direct)) grad_x_error = INFINITY;
        if (want_x) grad_x_error = std::fmax(grad_x_error, error(found.values(), expected.grad_x));
        if (!want_weight) return;
        Values total(taps);
        for (long i = 0; i < parts * taps; i++) total[i % taps] += sums[i];
        grad_weight_error = std::fmax(grad_weight_error, error(total, expected.grad_weight));
    };
    forward(false, false), forward(true, false), forward(true, true);
    backward(true, true, false), backward(true, false, true), backward(false, true, false);
    // a 16-bit result is right to its rounding: 2^-8 of a bfloat16, 2^-11 of a float16
    const double rounding = type == Type::float32 ? 1 : type == Type::bfloat16 ? 1e-6 * 256 : 1e-6 * 2048;
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

static std::vector<Shape> squares() {
    std::vector<Shape> shapes = {
        square(2, 3, 56, 56, 31), square(1, 35, 28, 28, 29), square(3, 17, 14, 14, 27),
        square(2, 33, 7, 7, 13), square(1, 5, 1, 1, 3), square(1, 2, 17, 23, 21), square(1, 3, 3, 70, 31),
        square(1, 2, 200, 20, 31), square(2, 40, 32, 32, 3), square(1, 9, 40, 9, 7), square(1, 1, 9, 8, 31),
        square(1, 2, 100, 170, 51), square(3, 83, 7, 7, 13),
        // tiles whose pixels can be used in place
        square(2, 2 * LANES + 1, 12, 170, 31), square(2, 2 * LANES + 1, 170, 12, 31)};
    // every transform there is, over rows and over columns, with both blocks of a group: length, the other
    // length, kernel
    const long lengths[][3] = {
        {4, 70, 31}, {5, 70, 31}, {6, 70, 31}, {10, 10, 13}, {12, 12, 13}, {14, 14, 11}, {16, 16, 15},
        {20, 20, 21}, {24, 24, 23}, {26, 26, 27}, {32, 32, 31}, {40, 40, 31}, {49, 12, 31}, {65, 12, 31},
        {81, 12, 31}, {85, 12, 31}, {97, 12, 31}, {105, 12, 31}, {113, 12, 31}, {129, 12, 31}, {145, 12, 31}};
    for (const auto& [length, other, kernel] : lengths) {
        shapes.push_back(square(1, LANES + 2, length, other, kernel));
        if (other != length) shapes.push_back(square(1, LANES + 2, other, length, kernel));
    }
    return shapes;
}

// Dilated kernels, rectangles, strips, any padding: some that networks have, and drawn ones.
static std::vector<Shape> others() {
    std::vector<Shape> shapes = {
        {2, 9, {same(56, 7, 3), same(56, 7, 3)}}, {1, LANES + 2, {same(14, 7, 2), same(14, 7, 2)}},
        {1, 2 * LANES + 1, {same(14, 3, 5), same(14, 3, 5)}}, {1, 3, {same(56, 51), same(56, 5)}},
        {1, LANES + 2, {same(64, 1), same(64, 21)}}, {2, LANES + 2, {same(56, 11), same(56, 1)}},
        {2, 2 * LANES, {same(1, 1), same(512, 31)}}, {2, 2 * LANES, {same(300, 51), same(9, 1)}},
        {1, 3, {same(1, 1), axis(10000, 64, 63, 0, 1)}}, {1, 3, {same(1, 1), axis(700, 40, 117, 0, 3)}}};
    std::mt19937 random(0);
    auto below = [&](long n) { return (long)(random() % n); };
    while (shapes.size() < 400) {
        auto draw_axis = [&](long longest, long most_taps) {
            const long inputs = 1 + below(longest), taps = 1 + below(most_taps);
            const long dilation = below(2) ? 1 : 1 + below(5), reach = (taps - 1) * dilation;
            return axis(inputs, taps, below(reach + 1), below(reach + 1), dilation);
        };
        const bool wide = below(4) == 0, strip = below(4) == 0;
        Geometry g{draw_axis(wide ? 120 : 30, 13), draw_axis(wide ? 120 : 30, 13)};
        if (strip) g = {same(1 + below(40), 1), same(30 + below(170), 30 + below(40), 1 + below(2))};
        if (below(2)) std::swap(g.vertical, g.horizontal);
        if (g.vertical.outputs > 0 && g.horizontal.outputs > 0)
            shapes.push_back({1 + below(3), 1 + below(2 * PAIR), g});
    }
    return shapes;
}

// Sums of many products, whose error must not grow with their number: over the pixels of a map, of many
// images, of narrow and of wide maps; over the taps of a kernel that no transform has room for; of dilated
// kernels and of lines.
static std::vector<Shape> long_sums() {
    return {square(2, 3, 256, 256, 3), square(2, 2, 117, 117, 7), square(300, 2, 28, 28, 3),
            square(150, 2, 14, 14, 13), square(1, 2, 20000, 5, 3), square(1, 2, 12, 20000, 3),
            square(1, 1, 90, 90, 179), {2, 3, {same(256, 3, 4), same(256, 3, 3)}},
            {4, 2, {same(300, 1), same(300, 41)}}, {1, 2, {same(1, 1), same(100000, 31)}}};
}

// Checks a shape in both memory formats; returns the largest error, and prints those beyond the bound.
static double check_formats(const Shape& s, Type type, double bound) {
    const Case expected(s, type);
    double worst = 0;
    for (int variant = 0; variant < 4; variant++) {
        const bool channels_last = variant & 1, at_end = variant & 2;
        const double e = check(expected, channels_last, at_end);
        if (!(e <= bound)) {
            printf("%ld x %ld", s.images, s.channels);
            for (const Axis& a : {s.geometry.vertical, s.geometry.horizontal})
                printf(" x %ld (kernel %ld, padding %ld and %ld, dilation %ld)", a.inputs, a.taps, a.padding,
                       a.padding_after(), a.dilation);
            printf(", type %d, channels_last %d: %.1e\n", (int)type, channels_last, e);
        }
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
    for (const Shape& s : squares()) {
        const Plan plan = make_plan(s.images, s.channels, s.geometry, Pass::forward);
        if (plan.method == Method::fft)
            row_sizes.insert(plan.row_transform->size), column_sizes.insert(plan.column_transform->size);
        for (Type type : {Type::float32, Type::bfloat16, Type::float16}) check_all(s, type, 2e-6);
    }
    std::map<Method, int> methods;
    for (const Shape& s : others()) {
        const Plan plan = make_plan(s.images, s.channels, s.geometry, Pass::forward);
        const Type types[] = {Type::bfloat16, Type::float32, Type::float16};
        check_all(s, types[methods[plan.method]++ % 3], 2e-6);
    }
    for (Method method : {Method::direct, Method::lines, Method::fft})
        if (methods[method] < 20) printf("method %d is hardly used\n", (int)method), failed = true;
    for (const Shape& s : long_sums()) check_all(s, Type::float32, 1e-6);
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
