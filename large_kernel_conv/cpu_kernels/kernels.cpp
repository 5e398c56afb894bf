// Which method's functions a plan calls.
#include "kernels.h"

#include <algorithm>

#include "digest.h"
#include "methods.h"
#include "simd.h"

Digest group_digest(const Plan& plan, const Images& weight, long group) {
    const long channel = group * PAIR, channels = std::min<long>(PAIR, plan.channels - channel);
    const size_t bytes = weight.bytes_per_channel();
    return {(const char*)weight.data + channel * bytes, channels * bytes};
}

void weight_spectra(const Plan& plan, const Images& weight, float* spectra, long begin, long end) {
    if (plan.method == Method::fft) fft_spectra(plan, weight, spectra, begin, end);
    else if (plan.method == Method::lines) line_spectra(plan, weight, spectra, begin, end);
}

long convolve_tasks(const Plan& plan, long parts) {
    return plan.channel_groups() * (plan.method == Method::direct ? parts : plan.images * plan.tiles());
}

void convolve(const Plan& plan, const Images& x, const Images& weight, const Spectra& spectra,
              const float* bias, bool relu, const Images& y, long parts, long begin, long end) {
    switch (plan.method) {
        case Method::fft: return fft_convolve(plan, x, weight, spectra, bias, relu, y, begin, end);
        case Method::lines: return line_convolve(plan, x, weight, spectra, bias, relu, y, begin, end);
        case Method::direct: return direct_convolve(plan, x, weight, bias, relu, y, parts, begin, end);
    }
}

void convolve_backward(const Plan& plan, const Images& grad_y, const Images& x, const Images& weight,
                       const Spectra& spectra, const Images& grad_x, float* grad_weight, long parts,
                       long begin, long end) {
    switch (plan.method) {
        case Method::fft:
            return fft_backward(plan, grad_y, x, weight, spectra, grad_x, grad_weight, parts, begin, end);
        case Method::lines:
            return line_backward(plan, grad_y, x, weight, spectra, grad_x, grad_weight, parts, begin, end);
        case Method::direct:
            return direct_backward(plan, grad_y, x, weight, grad_x, grad_weight, parts, begin, end);
    }
}
