#include "quantize.h"

#include <cmath>

#include "simd.h"

namespace {

float as_float(float f) { return f; }
float as_float(BFloat16 b) {
    const uint32_t bits = (uint32_t)b.bits << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}

template <class T>
void quantize(const T* x, const float* scale, const float* shift, uint8_t* levels, long channels, long begin,
              long end) {
    for (long pixel = begin; pixel < end; pixel++) {
        const T* from = x + pixel * channels;
        uint8_t* to = levels + pixel * channels;
        for (long c = 0; c < channels; c++) {  // plain, so that the compiler makes vectors of it
            const float level = as_float(from[c]) * scale[c] + shift[c];
            to[c] = (uint8_t)(int)std::nearbyint(level > 0 ? (level < 255 ? level : 255.0f) : 0.0f);
        }
    }
}

}  // namespace

void as_levels(Type type, const void* x, const float* scale, const float* shift, uint8_t* levels,
               long channels, long begin, long end) {
    if (type == Type::float32)
        quantize((const float*)x, scale, shift, levels, channels, begin, end);
    else
        quantize((const BFloat16*)x, scale, shift, levels, channels, begin, end);
}
