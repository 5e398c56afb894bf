// The kernels as torch operators. The operators are declared in ../operators.py; this registers what they do
// on CPUs.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <optional>
#include <tuple>

#include "fft.h"
#include "kernels.h"
#include "memory.h"
#include "quantize.h"
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

// An uninitialized tensor (N, C, height, width) of x's type and memory format; x is dense. The C library maps blocks of 32 MiB afresh each time, and
// the system then hands them out page by page, which can take longer than the convolution: large pages make
// it a few.
Tensor output_like(const Tensor& x, int64_t height, int64_t width) {
    // torch::stable::empty_like would look its operator up by name, half a microsecond
    int32_t dtype;
    AtenTensorHandle handle;
    const int64_t channels = x.size(1), sizes[] = {x.size(0), channels, height, width};
    const int64_t planes[] = {channels * height * width, height * width, width, 1};
    const int64_t pixels[] = {channels * height * width, 1, width * channels, channels};
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(4, sizes, x.is_contiguous() ? planes : pixels, dtype,
                                                           aoti_torch_device_type_cpu(), 0, &handle));
    Tensor y(handle);
    const size_t bytes = y.numel() * y.element_size();
    if (bytes >= 16 << 20) advise_large_pages(y.mutable_data_ptr(), bytes);
    return y;
}

// A weight (C, 1, Kh, Kw) is one image of C channels.
Images weight_of(const Tensor& weight) {
    Images t = images_of(weight);
    t.channels = weight.size(0), t.channels_last = false;
    return t;
}

Axis axis_of(int64_t inputs, int64_t taps, int64_t before, int64_t after, int64_t dilation) {
    const int64_t reach = (taps - 1) * dilation, outputs = inputs + before + after - reach;
    STD_TORCH_CHECK(dilation > 0 && before >= 0 && after >= 0 && before <= reach && after <= reach,
                    "a padding of 0 to (kernel - 1) * dilation is needed, on each side");
    STD_TORCH_CHECK(outputs > 0 || inputs == 0, "the kernel is larger than the padded map");
    return {inputs, inputs ? outputs : 0, taps, before, dilation};  // an empty map stays empty
}

// The zeros around a map and the dilation, as the operators are given them.
struct Where {
    int64_t top, bottom, left, right, down, across;
};

Geometry geometry_of(int64_t height, int64_t width, const Tensor& weight, const Where& w) {
    STD_TORCH_CHECK(weight.dim() == 4 && weight.size(1) == 1 && weight.size(2) > 0 && weight.size(3) > 0,
                    "weight (C, 1, Kh, Kw) is needed");
    return {axis_of(height, weight.size(2), w.top, w.bottom, w.down),
            axis_of(width, weight.size(3), w.left, w.right, w.across)};
}

Plan plan_for(const Tensor& x, const Tensor& weight, const Where& where, Pass pass) {
    STD_TORCH_CHECK(x.dim() == 4 && weight.size(0) == x.size(1),
                    "x (N, C, H, W) and weight (C, 1, Kh, Kw) are needed");
    const Geometry geometry = geometry_of(x.size(2), x.size(3), weight, where);
    return make_plan(x.size(0), x.size(1), geometry, pass);
}

Tensor output_of(const Plan& plan, const Tensor& x) {
    return output_like(x, plan.geometry.vertical.outputs, plan.geometry.horizontal.outputs);
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
              const std::optional<Tensor>& bias, bool relu, const Tensor& y) {
    const Images in = images_of(x), w = weight_of(weight), out = images_of(y, true);
    const float* const constants = bias ? (const float*)bias->const_data_ptr() : nullptr;
    const long parts = image_parts(plan);
    torch::stable::parallel_for(0, convolve_tasks(plan, parts), 1, [&](int64_t begin, int64_t end) {
        convolve(plan, in, w, spectra, constants, relu, out, parts, begin, end);
    });
}

Tensor depthwise_conv2d(const Tensor& given_x, const Tensor& given_weight,
                        const std::optional<Tensor>& given_bias, int64_t top, int64_t bottom, int64_t left,
                        int64_t right, int64_t down, int64_t across, bool keep) {
    const Tensor x = dense(given_x), weight = torch::stable::contiguous(given_weight);
    const Plan plan = plan_for(x, weight, {top, bottom, left, right, down, across}, Pass::forward);
    check_bias(x, given_bias);
    const std::optional<Tensor> bias = float_bias(given_bias);
    Tensor y = output_of(plan, x);
    if (y.numel() == 0) return y;
    with_spectra(plan, weight, keep, [&](const Spectra& spectra) {
        convolve(plan, x, weight, spectra, bias, false, y);
    });
    return y;
}

Tensor depthwise_conv2d_prepared(const Tensor& given_x, const Tensor& given_weight, const Tensor& spectra,
                                 const std::optional<Tensor>& given_bias, int64_t top, int64_t bottom,
                                 int64_t left, int64_t right, int64_t down, int64_t across, bool relu) {
    const Tensor x = dense(given_x), weight = torch::stable::contiguous(given_weight);
    const Plan plan = plan_for(x, weight, {top, bottom, left, right, down, across}, Pass::forward);
    check_bias(x, given_bias);
    const std::optional<Tensor> bias = float_bias(given_bias);
    const bool fits = spectra.scalar_type() == ScalarType::Float && spectra.is_contiguous() &&
                      spectra.numel() == plan.spectra_size();
    STD_TORCH_CHECK(fits, "these spectra were made for another weight, or for maps of another size");
    Tensor y = output_of(plan, x);
    if (y.numel() == 0) return y;
    const Spectra prepared{.values = (const float*)spectra.const_data_ptr()};
    convolve(plan, x, weight, prepared, bias, relu, y);
    return y;
}

// The spectra for maps of height x width, or an empty tensor where the direct kernel will run.
Tensor prepared_spectra(const Tensor& given_weight, int64_t height, int64_t width, int64_t top,
                        int64_t bottom, int64_t left, int64_t right, int64_t down, int64_t across) {
    const Tensor weight = torch::stable::contiguous(given_weight);
    const Geometry geometry = geometry_of(height, width, weight, {top, bottom, left, right, down, across});
    const Plan plan = make_plan(1, weight.size(0), geometry, Pass::forward);
    Tensor spectra = torch::stable::new_empty(weight, {plan.spectra_size()}, ScalarType::Float);
    if (plan.method == Method::direct) return spectra;
    compute_spectra(plan, weight_of(weight), (float*)spectra.mutable_data_ptr());
    return spectra;
}

std::tuple<Tensor, Tensor> depthwise_conv2d_backward(const Tensor& given_grad, const Tensor& given_x,
                                                     const Tensor& given_weight, int64_t top, int64_t bottom,
                                                     int64_t left, int64_t right, int64_t down,
                                                     int64_t across, bool want_x, bool want_weight,
                                                     bool keep) {
    const Tensor x = dense(given_x), grad = dense(given_grad);
    const Tensor weight = torch::stable::contiguous(given_weight);
    const Plan plan = plan_for(x, weight, {top, bottom, left, right, down, across}, Pass::backward);
    const Axis &vertical = plan.geometry.vertical, &horizontal = plan.geometry.horizontal;
    STD_TORCH_CHECK(grad.dim() == 4 && grad.size(0) == x.size(0) && grad.size(1) == x.size(1) &&
                        grad.size(2) == vertical.outputs && grad.size(3) == horizontal.outputs,
                    "the gradient has the shape of y");
    const int64_t groups = plan.channel_groups(), threads = torch::stable::get_num_threads();
    Tensor grad_x = want_x ? output_like(x, x.size(2), x.size(3)) : torch::stable::new_empty(x, {0});

    // each part adds up a weight gradient of its own: no more of them than let every thread have work
    int64_t parts = image_parts(plan);
    if (want_weight) parts = std::min<int64_t>(parts, (2 * threads - 1) / groups + 1);
    const int64_t size[] = {want_weight ? parts : 0, plan.channels, vertical.taps, horizontal.taps};
    const bool every_tap_is_written = plan.cropped == plan.geometry && grad.numel();
    Tensor grad_weight = every_tap_is_written ? torch::stable::new_empty(weight, size, ScalarType::Float)
                                              : torch::stable::new_zeros(weight, size, ScalarType::Float);

    auto work = [&](const Spectra& spectra) {
        const Images g = images_of(grad), in = images_of(x), w = weight_of(weight);
        Images out = images_of(x);
        out.data = want_x ? grad_x.mutable_data_ptr() : nullptr;
        float* sums = want_weight ? (float*)grad_weight.mutable_data_ptr() : nullptr;
        torch::stable::parallel_for(0, groups * parts, 1, [&](int64_t begin, int64_t end) {
            convolve_backward(plan, g, in, w, spectra, out, sums, parts, begin, end);
        });
    };
    if (grad.numel()) {
        if (want_x) with_spectra(plan, weight, keep, work);
        else work({});
    }
    const int64_t first = 0;
    if (want_weight && parts > 1) grad_weight = torch::stable::sum(grad_weight, {{&first, 1}});
    return {grad_x, torch::stable::view(grad_weight, {want_weight ? plan.channels : 0, 1, vertical.taps,
                                                      horizontal.taps})};
}

Tensor quantize_pixels(const Tensor& given_x, const Tensor& given_scale, const Tensor& given_shift) {
    const Tensor x = torch::stable::contiguous(given_x), scale = torch::stable::contiguous(given_scale),
                 shift = torch::stable::contiguous(given_shift);
    STD_TORCH_CHECK(x.dim() == 2 && scale.numel() == x.size(1) && shift.numel() == x.size(1) &&
                        scale.scalar_type() == ScalarType::Float && shift.scalar_type() == ScalarType::Float,
                    "x (P, C), and scale and shift (C,) in float32 are needed");
    const ScalarType type = x.scalar_type();
    STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16,
                    "pixels are quantized from float32 and bfloat16");
    Tensor levels = torch::stable::new_empty(x, {x.size(0), x.size(1)}, ScalarType::Byte);
    const int64_t some = std::max<int64_t>(1, 32768 / std::max<int64_t>(x.size(1), 1));
    torch::stable::parallel_for(0, x.size(0), some, [&](int64_t begin, int64_t end) {
        as_levels(type == ScalarType::Float ? Type::float32 : Type::bfloat16, x.const_data_ptr(),
                  (const float*)scale.const_data_ptr(), (const float*)shift.const_data_ptr(),
                  (uint8_t*)levels.mutable_data_ptr(), x.size(1), begin, end);
    });
    return levels;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(large_kernel_conv, CPU, m) {
    m.impl("depthwise_conv2d", TORCH_BOX(&depthwise_conv2d));
    m.impl("depthwise_conv2d_backward", TORCH_BOX(&depthwise_conv2d_backward));
    m.impl("prepared_spectra", TORCH_BOX(&prepared_spectra));
    m.impl("depthwise_conv2d_prepared", TORCH_BOX(&depthwise_conv2d_prepared));
    m.impl("quantize_pixels", TORCH_BOX(&quantize_pixels));
}

// For Python. given: channels, height, width, kernel height and width, padding top, bottom, left and right,
// dilation, vertical and horizontal. result: points of a row's transform, points of a column's (0 where there
// is none), tiles, floats of all spectra.
extern "C" void large_kernel_conv_plan(const int64_t* given, int64_t* result) {
    const auto [channels, height, width, kernel_height, kernel_width, top, bottom, left, right, down, across] =
        *(const std::array<int64_t, 11>*)given;
    const Geometry geometry{axis_of(height, kernel_height, top, bottom, down),
                            axis_of(width, kernel_width, left, right, across)};
    const Plan plan = make_plan(1, channels, geometry, Pass::forward);
    result[0] = plan.row_transform ? plan.row_transform->size : 0;
    result[1] = plan.column_transform ? plan.column_transform->size : 0;
    result[2] = plan.tiles();
    result[3] = plan.spectra_size();
}
