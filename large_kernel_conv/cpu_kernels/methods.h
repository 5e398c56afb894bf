// The same functions as in kernels.h, of each method.
#pragma once

#include "kernels.h"

void fft_spectra(const Plan&, const Images& weight, float* spectra, long begin, long end);
void fft_convolve(const Plan&, const Images& x, const Images& weight, const Spectra&, const float* bias,
                  bool relu, const Images& y, long begin, long end);
void fft_backward(const Plan&, const Images& grad_y, const Images& x, const Images& weight, const Spectra&,
                  const Images& grad_x, float* grad_weight, long parts, long begin, long end);

void line_spectra(const Plan&, const Images& weight, float* spectra, long begin, long end);
void line_convolve(const Plan&, const Images& x, const Images& weight, const Spectra&, const float* bias,
                   bool relu, const Images& y, long begin, long end);
void line_backward(const Plan&, const Images& grad_y, const Images& x, const Images& weight, const Spectra&,
                   const Images& grad_x, float* grad_weight, long parts, long begin, long end);

void direct_convolve(const Plan&, const Images& x, const Images& weight, const float* bias, bool relu,
                     const Images& y, long parts, long begin, long end);
void direct_backward(const Plan&, const Images& grad_y, const Images& x, const Images& weight,
                     const Images& grad_x, float* grad_weight, long parts, long begin, long end);
