"""The GPU kernels: depthwise convolutions as matrix products on tensor cores.

For one channel, what some rows of pixels (r, c) add to some rows of outputs (h, w) is a matrix product,
x @ T, with a Toeplitz matrix T of the kernel's weights:

    y[h, w] = sum over r, c of x[r, c] * T[(r, c), (h, w)]
    T[(r, c), (h, w)] = weight[(r - h + TOP) / DOWN, (c - w + LEFT) / ACROSS]

TOP and LEFT are the rows and columns of zeros before a map, DOWN and ACROSS the dilation. T is zero where
that is no tap: a dilated kernel is multiplied with the zeros between its taps. A program computes a tile of y
as the sum of such products. Their rows are bands, a few rows of one image each, of as many images as there
are: T is the same for all of them. Their columns are the pixels of a band. So a value of x that was loaded
serves all outputs of its band, and a value of T all bands. The gradient of x is the same with the kernel
turned by 180 degrees. That of the weight is the product the other way round, x.T @ grad, summed along the
diagonals of T; there the outputs are single rows, and only rows that meet a tap are multiplied.

A NaN or inf among the pixels reaches more of its channel of its image than the kernel does, since zeros of T
times it are NaN.

Everything is contiguous (N, C, H, W). Offsets within a tile are 32 bits wide, a tile's start 64. A width is
passed as WIDTH_BY_ALIGN * ALIGN with a constant ALIGN, so that the compiler knows how rows are aligned and
loads 16 bytes at once; that of y likewise, OUT_WIDTH_BY_ALIGN * OUT_ALIGN. IN_FLOAT32 is for Triton's
interpreter, whose product of bfloat16 is wrong. triton_conv.py launches the kernels and chooses the sizes.
"""
import triton
import triton.language as tl


@triton.jit
def lay_out_taps(weight, taps, height, width, top, left,
                 KERNEL_HEIGHT: tl.constexpr, KERNEL_WIDTH: tl.constexpr, LEFT: tl.constexpr,
                 DOWN: tl.constexpr, ACROSS: tl.constexpr, PACK: tl.constexpr,
                 TURNED: tl.constexpr, BLOCK: tl.constexpr):
    """taps (C, height, width, PACK) = weight, or TURNED, between zeros, an output's own column at `left`:

    taps[:, i, d, p] = weight[:, (i - top) / DOWN, (d + p - left + LEFT) / ACROSS]. With PACK neighbours at
    each place a single load fetches them, at any place. Grid: (blocks of a channel's values, channels).
    """
    channel = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = i // (width * PACK) - top
    column = i // PACK % width + i % PACK - left + LEFT
    is_tap = ((row >= 0) & (row < KERNEL_HEIGHT * DOWN) & (row % DOWN == 0)
              & (column >= 0) & (column < KERNEL_WIDTH * ACROSS) & (column % ACROSS == 0))
    tap = row // DOWN * KERNEL_WIDTH + column // ACROSS
    if TURNED:
        tap = KERNEL_HEIGHT * KERNEL_WIDTH - 1 - tap
    value = tl.load(weight + channel * (KERNEL_HEIGHT * KERNEL_WIDTH) + tap, mask=is_tap, other=0.0)
    size = height * width * PACK
    tl.store(taps + channel * size + i, value.to(taps.dtype.element_ty), mask=i < size)


@triton.jit
def unpack(words, dtype: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(ROWS, COLUMNS) values of 16 bits, four from each of `words` (ROWS, COLUMNS / 4) of 64."""
    even = tl.join(words.to(tl.int16), (words >> 32).to(tl.int16))
    odd = tl.join((words >> 16).to(tl.int16), (words >> 48).to(tl.int16))
    return tl.reshape(tl.join(even, odd), (ROWS, COLUMNS)).to(dtype, bitcast=True)


@triton.jit
def store_bands(y, values, band_offset, image_exists, rows_left, column, width, tile_width,
                COLUMNS: tl.constexpr):
    """Store `values` (bands, pixels), or those of them that are of an image, at y + band_offset.

    rows_left (bands,): rows of each band. The pixels are rows of tile_width columns, from `column` on.
    """
    n = tl.arange(0, values.shape[1])
    if COLUMNS:
        row, across = n // tile_width, n % tile_width
        exists = (row[None, :] < rows_left[:, None]) & (column + across < width)[None, :]
        offset = row * width + column + across
    else:  # a band is contiguous in memory, which the compiler cannot see in rows and columns
        exists = n[None, :] < (rows_left * width)[:, None]
        offset = n
    tl.store(y + (band_offset[:, None] + offset[None, :]), values.to(y.dtype.element_ty),
             mask=image_exists[:, None] & exists)


# Grid: (tiles of an image's columns * of its rows * of the images, channels). A tile is BANDS bands of ROWS
# rows by COLUMNS columns (0: all of them) of IMAGES images. A matrix product adds what IN_ROWS rows by DEPTH
# columns of pixels, as far from each band, contribute to it: (IMAGES * BANDS, IN_ROWS * DEPTH) @ (IN_ROWS *
# DEPTH, PIXELS), where PIXELS is a band's ROWS * COLUMNS rounded up to a power of two. float32 taps come one
# by one, others as words of 64 bits.
@triton.jit
def convolve(x, taps, bias, y, images, channels, height, width_by_align, out_height, out_width_by_align,
             taps_height, taps_width, top, left,
             REACH_DOWN: tl.constexpr, REACH_ACROSS: tl.constexpr, TOP: tl.constexpr, LEFT: tl.constexpr,
             ALIGN: tl.constexpr, OUT_ALIGN: tl.constexpr, HAS_BIAS: tl.constexpr,
             IMAGES: tl.constexpr, BANDS: tl.constexpr, ROWS: tl.constexpr,
             COLUMNS: tl.constexpr, PIXELS: tl.constexpr, IN_ROWS: tl.constexpr, DEPTH: tl.constexpr,
             PRECISION: tl.constexpr, IN_FLOAT32: tl.constexpr):
    """y = convolution of x with the kernels that lay_out_taps laid out + bias.

    REACH_DOWN, REACH_ACROSS: rows from the first to the last of a kernel, and columns.
    """
    PACK: tl.constexpr = taps.dtype.element_ty.primitive_bitwidth // x.dtype.element_ty.primitive_bitwidth
    width, out_width = width_by_align * ALIGN, out_width_by_align * OUT_ALIGN
    area, out_area = height * width, out_height * out_width
    tile_width = COLUMNS if COLUMNS else out_width
    channel = tl.program_id(1)
    tiles_across, tiles_down = tl.cdiv(out_width, tile_width), tl.cdiv(out_height, BANDS * ROWS)
    tile = tl.program_id(0)
    column = tile % tiles_across * tile_width
    row = tile // tiles_across % tiles_down * (BANDS * ROWS)
    image = tile // (tiles_across * tiles_down) * IMAGES
    plane = image.to(tl.int64) * channels + channel
    x += plane * area + row * width
    y += plane * out_area + row * out_width

    m = tl.arange(0, IMAGES * BANDS)
    band_row = m % BANDS * ROWS
    band_offset = m // BANDS * (channels * area) + band_row * width
    image_exists = image + m // BANDS < images
    n = tl.arange(0, PIXELS)
    out_row = n // tile_width
    out_column = n - out_row * tile_width
    k = tl.arange(0, IN_ROWS * DEPTH)
    in_row, in_column = k // DEPTH, k % DEPTH
    # where T lies in taps: column d + left has the taps of an input column that is d columns to the right of
    # the output's
    first_tap = tl.where(out_row < ROWS, (top - out_row) * taps_width + left - column - out_column,
                         left - column)
    word = tl.arange(0, IN_ROWS * DEPTH // PACK) * PACK
    tap = first_tap[:, None] + (word // DEPTH * taps_width + word % DEPTH)[None, :]
    taps += channel.to(tl.int64) * (taps_height * taps_width)

    total = tl.zeros((IMAGES * BANDS, PIXELS), tl.float32)
    # rows before the first shift and after the last meet the padding only
    first_shift = tl.maximum(0, TOP - (row + (BANDS - 1) * ROWS))
    last_shift = tl.minimum(REACH_DOWN + ROWS, height + TOP - row)
    first_column = tl.maximum(0, column - LEFT) // DEPTH * DEPTH
    for c in range(first_column, tl.minimum(width, column + tile_width + REACH_ACROSS - LEFT), DEPTH):
        for shift in range(first_shift, last_shift, IN_ROWS):
            row_in_map = (row + shift - TOP) + band_row[:, None] + in_row[None, :]
            inside = (image_exists[:, None] & (row_in_map >= 0) & (row_in_map < height)
                      & (c + in_column < width)[None, :])
            offset = band_offset[:, None] + (in_row * width + c + in_column)[None, :]
            pixels = tl.load(x + (shift - TOP) * width + offset, mask=inside, other=0.0)
            toeplitz = tl.load(taps + (shift * taps_width + c) + tap)
            if PACK > 1:
                toeplitz = unpack(toeplitz, x.dtype.element_ty, PIXELS, IN_ROWS * DEPTH)
            if IN_FLOAT32:
                pixels, toeplitz = pixels.to(tl.float32), toeplitz.to(tl.float32)
            total = tl.dot(pixels, tl.trans(toeplitz), total, input_precision=PRECISION)
    if HAS_BIAS:
        total += tl.load(bias + channel).to(tl.float32)
    rows_left = tl.minimum(ROWS, out_height - row - band_row)
    out_offset = m // BANDS * (channels * out_area) + band_row * out_width
    store_bands(y, total, out_offset, image_exists, rows_left, column, out_width, tile_width, COLUMNS)


@triton.jit
def sum_diagonals(product, shift, KERNEL_WIDTH: tl.constexpr, ACROSS: tl.constexpr, TAPS: tl.constexpr):
    """(kernel rows, TAPS): for tap k the sum of product[kernel row, c, w] over c = k * ACROSS + w + shift."""
    KERNEL_ROWS: tl.constexpr = product.shape[0]
    IN_COLUMNS: tl.constexpr = product.shape[1]
    OUT_COLUMNS: tl.constexpr = product.shape[2]
    taps = tl.arange(0, TAPS)
    position = (taps * ACROSS)[:, None] + tl.arange(0, OUT_COLUMNS)[None, :] + shift
    meets = (position >= 0) & (position < IN_COLUMNS) & (taps < KERNEL_WIDTH)[:, None]
    position = tl.broadcast_to(tl.where(meets, position, 0)[None, :, :], (KERNEL_ROWS, TAPS, OUT_COLUMNS))
    return tl.sum(tl.where(meets[None, :, :], tl.gather(product, position, 1), 0.0), 2)


# Grid: (blocks of KERNEL_ROWS kernel rows, channels, parts of the images). A matrix product sums over IMAGES
# x ROWS rows of grad, the gradient of y, each with the row of x that lies KERNEL_ROWS kernel rows away:
# product[kernel row, c, w] = sum of x[h + kernel row * DOWN - TOP, c] * grad[h, w] for IN_COLUMNS columns c
# and OUT_COLUMNS columns w. Tap k of a kernel row is then the sum over c - w + LEFT = k * ACROSS. TAPS:
# KERNEL_WIDTH rounded up to a power of two.
@triton.jit
def weight_gradient(x, grad, sums, images, channels, height, width_by_align, out_height, out_width_by_align,
                    parts,
                    KERNEL_HEIGHT: tl.constexpr, KERNEL_WIDTH: tl.constexpr, TAPS: tl.constexpr,
                    TOP: tl.constexpr, LEFT: tl.constexpr, DOWN: tl.constexpr, ACROSS: tl.constexpr,
                    ALIGN: tl.constexpr, OUT_ALIGN: tl.constexpr, KERNEL_ROWS: tl.constexpr,
                    IN_COLUMNS: tl.constexpr, OUT_COLUMNS: tl.constexpr, IMAGES: tl.constexpr,
                    ROWS: tl.constexpr, PRECISION: tl.constexpr, IN_FLOAT32: tl.constexpr):
    """sums[part, channel] (KERNEL_HEIGHT, KERNEL_WIDTH), float32 = the weight's gradient by some images."""
    RIGHT: tl.constexpr = (KERNEL_WIDTH - 1) * ACROSS - LEFT
    width, out_width = width_by_align * ALIGN, out_width_by_align * OUT_ALIGN
    area, out_area = height * width, out_height * out_width
    first_kernel_row = tl.program_id(0) * KERNEL_ROWS
    channel = tl.program_id(1)
    part = tl.program_id(2)
    # the rows of the product: kernel rows, and input columns for each
    m = tl.arange(0, KERNEL_ROWS * IN_COLUMNS)
    shift = (first_kernel_row + m // IN_COLUMNS) * DOWN - TOP
    is_kernel_row = first_kernel_row + m // IN_COLUMNS < KERNEL_HEIGHT
    # what it sums over: rows of this part's images, those that meet a row of x through one of the kernel rows
    # at least
    r = tl.arange(0, IMAGES * ROWS)
    r_offset = r // ROWS * (channels * area) + r % ROWS * width
    r_out_offset = r // ROWS * (channels * out_area) + r % ROWS * out_width
    first_row = tl.maximum(0, TOP - (first_kernel_row + KERNEL_ROWS - 1) * DOWN)
    last_row = tl.minimum(out_height, height + TOP - first_kernel_row * DOWN)
    steps_down = tl.cdiv(tl.maximum(0, last_row - first_row), ROWS)
    image_blocks = tl.cdiv(images, IMAGES)
    blocks_of_part = tl.cdiv(image_blocks, parts)
    first_step = part * blocks_of_part * steps_down
    last_step = tl.minimum(image_blocks, (part + 1) * blocks_of_part) * steps_down

    across = tl.arange(0, OUT_COLUMNS)
    taps = tl.arange(0, TAPS)
    gradient = tl.zeros((KERNEL_ROWS, TAPS), tl.float32)
    for w in range(0, out_width, OUT_COLUMNS):
        grad_offset = r_out_offset[:, None] + (w + across)[None, :]
        first_column = tl.maximum(0, w - LEFT) // IN_COLUMNS * IN_COLUMNS
        for c in range(first_column, tl.minimum(width, w + OUT_COLUMNS + RIGHT), IN_COLUMNS):
            in_column = c + m % IN_COLUMNS
            x_offset = ((m // IN_COLUMNS * DOWN - TOP) * width + in_column)[:, None] + r_offset[None, :]
            in_x = is_kernel_row & (in_column < width)
            product = tl.zeros((KERNEL_ROWS * IN_COLUMNS, OUT_COLUMNS), tl.float32)
            for step in range(first_step, last_step):
                image = step // steps_down * IMAGES
                row = first_row + step % steps_down * ROWS
                plane = image.to(tl.int64) * channels + channel
                row_in_map = row + r % ROWS
                exists = (image + r // ROWS < images) & (row_in_map < last_row)
                in_grad = exists[:, None] & (w + across < out_width)[None, :]
                grads = tl.load(grad + (plane * out_area + row * out_width) + grad_offset, mask=in_grad,
                                other=0.0)
                x_row = row_in_map[None, :] + shift[:, None]
                inside = exists[None, :] & (x_row >= 0) & (x_row < height) & in_x[:, None]
                start = plane * area + (row + first_kernel_row * DOWN) * width
                pixels = tl.load(x + start + x_offset, mask=inside, other=0.0)
                if IN_FLOAT32:
                    pixels, grads = pixels.to(tl.float32), grads.to(tl.float32)
                product = tl.dot(pixels, grads, product, input_precision=PRECISION)
            product = tl.reshape(product, (KERNEL_ROWS, IN_COLUMNS, OUT_COLUMNS))
            gradient += sum_diagonals(product, w - LEFT - c, KERNEL_WIDTH, ACROSS, TAPS)
    kernel_row = first_kernel_row + tl.arange(0, KERNEL_ROWS)
    sums_row = (part * channels + channel).to(tl.int64) * KERNEL_HEIGHT + kernel_row[:, None]
    tl.store(sums + sums_row * KERNEL_WIDTH + taps[None, :], gradient,
             mask=(kernel_row < KERNEL_HEIGHT)[:, None] & (taps < KERNEL_WIDTH)[None, :])
