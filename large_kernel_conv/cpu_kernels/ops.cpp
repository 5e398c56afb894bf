// The kernels as torch operators. The operators are declared in ../__init__.py; this registers what they do
// on CPUs.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "fft.h"
#include "kernels.h"
#include "memory.h"
#include "spectra_cache.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

bool is_channels_last(const Tensor& t) {
    const int order[] = {1, 3, 2, 0};  // from the innermost dimension outwards
    int64_t expected = 1;
    for (int d : order) {
        if (t.size(d) != 1 && t.stride(d) != expected) return false;
        expected *= t.size(d);
    }
    return true;
}

Tensor dense(const Tensor& t) {
    return t.is_contiguous() || is_channels_last(t) ? t : torch::stable::contiguous(t);
}

Images images_of(const Tensor& t, bool written = false) {
    const ScalarType type = t.scalar_type();
    STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
                    "the CPU kernels compute in float32, bfloat16 and float16");
    return {written ? t.mutable_data_ptr() : const_cast<void*>(t.const_data_ptr()),
            type == ScalarType::Float      ? Type::float32
            : type == ScalarType::BFloat16 ? Type::bfloat16
                                           : Type::float16,
            t.size(1), t.size(2), t.size(3), !t.is_contiguous()};
}

// An uninitialized tensor like x, which is dense. The C library maps blocks of 32 MiB afresh each time, and
// the system then hands them out page by page, which can take longer than the convolution: large pages make
// it a few.
Tensor output_like(const Tensor& x) {
    // torch::stable::empty_like would look its operator up by name, half a microsecond
    int32_t dtype;
    AtenTensorHandle handle;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(4, x.sizes().data(), x.strides().data(), dtype,
                                                           aoti_torch_device_type_cpu(), 0, &handle));
    Tensor y(handle);
    const size_t bytes = y.numel() * y.element_size();
    if (bytes >= 16 << 20) advise_large_pages(y.mutable_data_ptr(), bytes);
    return y;
}

// A weight (C, 1, K, K) is one image of C channels.
Images weight_of(const Tensor& weight) {
    Images t = images_of(weight);
    t.channels = weight.size(0), t.channels_last = false;
    return t;
}

Plan plan_for(const Tensor& x, const Tensor& weight) {
    STD_TORCH_CHECK(x.dim() == 4 && weight.dim() == 4 && weight.size(0) == x.size(1) && weight.size(1) == 1 &&
                        weight.size(2) == weight.size(3) && weight.size(2) % 2 == 1,
                    "x (N, C, H, W) and weight (C, 1, K, K) with odd K are needed");
    const Geometry geometry = same_padding(weight.size(2), weight.size(3));
    return make_plan(x.size(0), x.size(1), x.size(2), x.size(3), geometry);
}

void compute_spectra(const Plan& plan, const Images& weight, float* spectra) {
    torch::stable::parallel_for(0, plan.channel_groups(), 1, [&](int64_t begin, int64_t end) {
        weight_spectra(plan, weight, spectra, begin, end);
    });
}

// Valid until this thread's next call.
const float* spectra_for_once(const Plan& plan, const Images& weight) {
    static thread_local Arena arena;  // not thread_arena(), which this thread's share of the work needs
    Buffer spectra{plan.spectra_size()};
    arena.place({&spectra});
    compute_spectra(plan, weight, spectra);
    return spectra;
}

SpectraCache cache;

// Calls work(spectra) with the spectra of the weight, from the cache where `keep`; for the direct kernel,
// with none.
template <class F>
void with_spectra(const Plan& plan, const Tensor& weight, bool keep, F work) {
    if (plan.method == Method::direct) return work({});
    const Images w = weight_of(weight);
    if (!keep) return work({.values = spectra_for_once(plan, w)});
    SpectraCache::Held entry = cache.find(plan, w);
    if (!entry) {
        auto compute = [&](const Images& copy, float* spectra) { compute_spectra(plan, copy, spectra); };
        entry = cache.add(plan, w, compute);
    }
    std::atomic<bool> stale = false;
    work({.values = entry->spectra.get(), .digests = entry->digests.data(), .stale = &stale});
    if (stale) cache.remove(entry);
}

void check_bias(const Tensor& x, const std::optional<Tensor>& bias) {
    STD_TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == x.size(1)), "bias (C,) is needed");
}

const float* data_or_null(const std::optional<Tensor>& bias) {
    return bias ? (const float*)bias->const_data_ptr() : nullptr;
}

std::optional<Tensor> float_bias(const std::optional<Tensor>& bias) {
    if (!bias) return bias;
    return torch::stable::contiguous(torch::stable::to(*bias, ScalarType::Float));
}

// Into how many parts the images are taken apart, to be shared out among threads: one where there are
// channels enough for that.
long image_parts(const Plan& plan) {
    return plan.channel_groups() >= 8 * torch::stable::get_num_threads() ? 1 : std::max(plan.images, 1L);
}

void convolve(const Plan& plan, const Tensor& x, const Tensor& weight, const Spectra& spectra,
              const float* bias, bool relu, const Tensor& y) {
    const Images in = images_of(x), w = weight_of(weight), out = images_of(y, true);
    const bool fft = plan.method == Method::fft;
    const long parts = image_parts(plan);
    const long tasks = plan.channel_groups() * (fft ? plan.images * plan.tiles() : parts);
    torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
        if (fft) fft_forward(plan, in, w, spectra, bias, relu, out, begin, end);
        else direct_forward(plan, in, w, bias, relu, out, parts, begin, end);
    });
}

Tensor depthwise_conv2d(const Tensor& given_x, const Tensor& given_weight,
                        const std::optional<Tensor>& given_bias, bool keep) {
    const Tensor x = dense(given_x), weight = torch::stable::contiguous(given_weight);
    const Plan plan = plan_for(x, weight);
    check_bias(x, given_bias);
    const std::optional<Tensor> bias = float_bias(given_bias);
    Tensor y = output_like(x);
    if (x.numel() == 0) return y;
    with_spectra(plan, weight, keep, [&](const Spectra& spectra) {
        convolve(plan, x, weight, spectra, data_or_null(bias), false, y);
    });
    return y;
}

Tensor depthwise_conv2d_prepared(const Tensor& given_x, const Tensor& given_weight, const Tensor& spectra,
                                 const std::optional<Tensor>& given_bias, bool relu) {
    const Tensor x = dense(given_x), weight = torch::stable::contiguous(given_weight);
    const Plan plan = plan_for(x, weight);
    check_bias(x, given_bias);
    const std::optional<Tensor> bias = float_bias(given_bias);
    const bool fits = spectra.scalar_type() == ScalarType::Float && spectra.is_contiguous() &&
                      spectra.numel() == plan.spectra_size();
    STD_TORCH_CHECK(fits, "these spectra were made for another weight, or for maps of another size");
    Tensor y = output_like(x);
    if (x.numel() == 0) return y;
    const Spectra prepared{.values = (const float*)spectra.const_data_ptr()};
    convolve(plan, x, weight, prepared, data_or_null(bias), relu, y);
    return y;
}

// The spectra for maps of height x width, or an empty tensor where the direct kernel will run.
Tensor prepared_spectra(const Tensor& given_weight, int64_t height, int64_t width) {
    const Tensor weight = torch::stable::contiguous(given_weight);
    const Geometry geometry = same_padding(weight.size(2), weight.size(3));
    const Plan plan = make_plan(1, weight.size(0), height, width, geometry);
    Tensor spectra = torch::stable::new_empty(weight, {plan.spectra_size()}, ScalarType::Float);
    if (plan.method == Method::direct) return spectra;
    compute_spectra(plan, weight_of(weight), (float*)spectra.mutable_data_ptr());
    return spectra;
}

std::tuple<Tensor, Tensor> depthwise_conv2d_backward(const Tensor& given_grad, const Tensor& given_x,
                                                     const Tensor& given_weight, bool want_x,
                                                     bool want_weight, bool keep) {
    const Tensor x = dense(given_x), grad = dense(given_grad);
    const Tensor weight = torch::stable::contiguous(given_weight);
    const Plan plan = plan_for(x, weight);
    for (int d = 0; d < 4; d++)
        STD_TORCH_CHECK(grad.dim() == 4 && grad.size(d) == x.size(d), "the gradient has the shape of x");
    const int64_t groups = plan.channel_groups(), threads = torch::stable::get_num_threads();
    Tensor grad_x = want_x ? output_like(x) : torch::stable::new_empty(x, {0});

    // each part adds up a weight gradient of its own: no more of them than let every thread have work
    int64_t parts = image_parts(plan);
    if (want_weight) parts = std::min<int64_t>(parts, (2 * threads - 1) / groups + 1);
    const int64_t height = weight.size(2), width = weight.size(3);
    const int64_t size[] = {want_weight ? parts : 0, plan.channels, height, width};
    const bool every_tap_is_written = plan.cropped == plan.geometry && x.numel();
    Tensor grad_weight = every_tap_is_written ? torch::stable::new_empty(weight, size, ScalarType::Float)
                                              : torch::stable::new_zeros(weight, size, ScalarType::Float);

    auto work = [&](const Spectra& spectra) {
        const bool fft = plan.method == Method::fft;
        const Images g = images_of(grad), in = images_of(x), w = weight_of(weight);
        Images out = images_of(x);
        out.data = want_x ? grad_x.mutable_data_ptr() : nullptr;
        float* sums = want_weight ? (float*)grad_weight.mutable_data_ptr() : nullptr;
        torch::stable::parallel_for(0, groups * parts, 1, [&](int64_t begin, int64_t end) {
            if (fft) fft_backward(plan, g, in, w, spectra, out, sums, parts, begin, end);
            else direct_backward(plan, g, in, w, out, sums, parts, begin, end);
        });
    };
    if (x.numel()) {
        if (want_x) with_spectra(plan, weight, keep, work);
        else work({});
    }
    const int64_t first = 0;
    if (want_weight && parts > 1) grad_weight = torch::stable::sum(grad_weight, {{&first, 1}});
    return {grad_x, torch::stable::view(grad_weight, {want_weight ? plan.channels : 0, 1, height, width})};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(large_kernel_conv, CPU, m) {
    m.impl("depthwise_conv2d", TORCH_BOX(&depthwise_conv2d));
    m.impl("depthwise_conv2d_backward", TORCH_BOX(&depthwise_conv2d_backward));
    m.impl("prepared_spectra", TORCH_BOX(&prepared_spectra));
    m.impl("depthwise_conv2d_prepared", TORCH_BOX(&depthwise_conv2d_prepared));
}

// For Python: result = {points of a row's transform, points of a column's, tiles, floats of all spectra};
// zeros for the direct kernel.
extern "C" void large_kernel_conv_plan(long channels, long height, long width, long kernel_height,
                                       long kernel_width, long* result) {
    const Plan plan = make_plan(1, channels, height, width, same_padding(kernel_height, kernel_width));
    const bool fft = plan.method == Method::fft;
    result[0] = fft ? plan.row_transform->size : 0;
    result[1] = fft ? plan.column_transform->size : 0;
    result[2] = plan.tiles();
    result[3] = plan.spectra_size();
}
