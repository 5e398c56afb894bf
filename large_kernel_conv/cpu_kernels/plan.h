// How a convolution will be computed: by Fourier transforms or directly, and in which pieces. Free of torch's
// headers.
#pragma once

struct Transform;

// One axis of a convolution. Output o is the sum over taps i of tap i times input o - padding + i * dilation,
// which is zero where there is none. Neither the padding nor that behind the inputs is larger than reach().
struct Axis {
    long inputs, outputs, taps, padding, dilation;
    long reach() const { return (taps - 1) * dilation; }  // from the first tap to the last
    long padding_after() const { return outputs + reach() - inputs - padding; }
    // The convolution that makes the gradient of the inputs from that of the outputs, taps in reverse.
    Axis reversed() const { return {outputs, inputs, taps, reach() - padding, dilation}; }
    bool operator==(const Axis&) const = default;
};

struct Geometry {
    Axis vertical, horizontal;
    Geometry reversed() const { return {vertical.reversed(), horizontal.reversed()}; }
    long taps() const { return vertical.taps * horizontal.taps; }
    bool operator==(const Geometry&) const = default;
};

enum class Method {
    direct,  // as it is written down
    lines,   // Fourier transforms along one axis, of kernels with one row or one column
    fft      // along both
};

// What the methods share out among threads are channel groups: for `direct` one block of LANES adjacent
// channels, for the others two such blocks.
struct Plan {
    Method method;
    long images, channels;
    Geometry geometry;  // as it was given
    Geometry cropped;   // without the taps that meet no input, which is what is computed
    Geometry tiled;     // whose outputs are cut into tiles or bands: `cropped`, for gradients its reverse

    // Of `fft`, and one of them of `lines`: over a row and over a column.
    const Transform *row_transform = nullptr, *column_transform = nullptr;
    long tile_height = 0, tile_width = 0;   // outputs of one transform; of `lines`, of some transforms
    long tiles_down = 0, tiles_across = 0;  // of one image

    long channel_groups() const;
    long tiles() const { return tiles_down * tiles_across; }
    long spectrum_size() const;  // floats of one channel group's weight spectrum; none for `direct`
    long spectra_size() const { return channel_groups() * spectrum_size(); }
};

enum class Pass { forward, backward };

// The fastest way, by a count of vector instructions.
Plan make_plan(long images, long channels, const Geometry&, Pass);

// How one axis of a map is cut: outputs begin ... end of a piece need the inputs from ... to.
struct Span {
    long begin, end, from, to;
};
Span span(const Axis&, long begin, long end);
