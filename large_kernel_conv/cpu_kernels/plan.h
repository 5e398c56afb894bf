// How a convolution will be computed: by Fourier transforms or directly, and in which pieces. Free of torch's
// headers.
#pragma once

struct Transform;

// Where the taps of a kernel lie. Output (y, x) is the sum over taps (i, j) of kernel (i, j) times the input
// at (y + i * dilation - padding_top, x + j * dilation - padding_left), which is zero beyond the map.
struct Geometry {
    long kernel_height, kernel_width;
    long padding_top, padding_left;
    static constexpr long dilation = 1;  // fixed for now
    bool operator==(const Geometry&) const = default;
};

// Of a kernel with odd sides, as many outputs as inputs: the padding is fixed for now.
Geometry same_padding(long kernel_height, long kernel_width);

enum class Method { direct, fft };

// What the two methods share out among threads are channel groups: for `direct` one block of LANES adjacent
// channels, for `fft` two such blocks.
struct Plan {
    Method method;
    long images, channels, height, width;
    Geometry geometry;  // of the kernel as it was given
    Geometry cropped;   // of its part that can reach the map, which is what is computed

    // Of Method::fft alone.
    const Transform *row_transform = nullptr, *column_transform = nullptr;  // over a row and over a column
    long tile_height = 0, tile_width = 0;                                   // outputs of one transform
    long tiles_down = 0, tiles_across = 0;                                  // of one image

    long channel_groups() const;
    long tiles() const { return tiles_down * tiles_across; }
    long spectrum_size() const;  // floats of one channel group's weight spectrum; none for `direct`
    long spectra_size() const { return channel_groups() * spectrum_size(); }
};

// The faster way, by a count of vector instructions.
Plan make_plan(long images, long channels, long height, long width, const Geometry&);

// How one axis of a map is cut: outputs begin ... end of a piece need the inputs from ... to.
struct Span {
    long begin, end, from, to;
};
Span vertical_span(const Plan&, long begin, long end);
Span horizontal_span(const Plan&, long begin, long end);
