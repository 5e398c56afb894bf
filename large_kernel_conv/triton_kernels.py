"""The GPU kernels: depthwise convolutions as matrix products on tensor cores.

For one channel and one row of the kernel, convolving rows of pixels is a matrix product, x @ T, with a Toeplitz matrix T of
the kernel row's weights:

    y[h, w] = sum over kh of sum over c of x[h + kh - P, c] * T[kh][c, w]        T[kh][c, w] = weight[kh, c - w + P]

P = K // 2. c counts input columns, w output columns; T is zero where c - w + P is no tap. A program computes a tile of y, some
rows of some images by COLUMNS output columns, as the sum of such products. The gradient of x is the same with the kernel
turned by 180 degrees. That of the weight is the product the other way round, x.T @ grad, summed along the diagonals of T.

A NaN or inf among the pixels reaches its whole row of a tile, since zeros of T times it are NaN.

Everything is contiguous (N, C, H, W). Offsets within a tile are 32 bits wide, a tile's start 64. A width is passed as
WIDTH_BY_ALIGN * ALIGN with a constant ALIGN, so that the compiler knows how rows are aligned and loads 16 bytes at once.
IN_FLOAT32 is for Triton's interpreter, whose product of bfloat16 is wrong. triton_conv.py launches the kernels and chooses the
sizes.
"""
import triton
import triton.language as tl


@triton.jit
def convolve(x, weight, bias, y, images, channels, height, width_by_align,
             K: tl.constexpr, ALIGN: tl.constexpr, TURNED: tl.constexpr, HAS_BIAS: tl.constexpr, IMAGES: tl.constexpr,
             ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr, IN_FLOAT32: tl.constexpr):
    """y = convolution of x with weight (or, TURNED, with weight turned by 180 degrees) + bias.

    Grid: (tiles of an image's columns * of its rows * of the images, channels). A tile is IMAGES x ROWS by COLUMNS; a matrix
    product adds what DEPTH input columns contribute through one kernel row.
    """
    P: tl.constexpr = K // 2
    width = width_by_align * ALIGN
    area = height * width
    channel = tl.program_id(1)
    tiles_across, tiles_down = tl.cdiv(width, COLUMNS), tl.cdiv(height, ROWS)
    tile = tl.program_id(0)
    column = tile % tiles_across * COLUMNS
    row = tile // tiles_across % tiles_down * ROWS
    image = tile // (tiles_across * tiles_down) * IMAGES
    start = (image.to(tl.int64) * channels + channel) * area + row * width

    # the tile's rows, of all its images, are the rows of the product
    m = tl.arange(0, IMAGES * ROWS)
    row_offset = m // ROWS * (channels * area) + m % ROWS * width
    row_in_map = row + m % ROWS
    image_exists = image + m // ROWS < images
    across = tl.arange(0, COLUMNS)
    deep = tl.arange(0, DEPTH)

    total = tl.zeros((IMAGES * ROWS, COLUMNS), tl.float32)
    first_kernel_row = tl.maximum(0, P - (row + ROWS - 1))  # those before and after meet the padding only
    last_kernel_row = tl.minimum(K, height + P - row)
    for c in range(tl.maximum(0, column - P) // DEPTH * DEPTH, tl.minimum(width, column + COLUMNS + P), DEPTH):
        tap = (c - column + P) + deep[:, None] - across[None, :]
        is_tap = (tap >= 0) & (tap < K)
        if TURNED:
            tap = K - 1 - tap
        tap = tl.where(is_tap, tap, 0)
        for kernel_row in range(first_kernel_row, last_kernel_row):
            shift = kernel_row - P
            inside = image_exists & (row_in_map + shift >= 0) & (row_in_map + shift < height)
            pixels = tl.load(x + (start + shift * width) + (row_offset[:, None] + (c + deep)[None, :]),
                             mask=inside[:, None] & (c + deep < width)[None, :], other=0.0)
            weight_row = K - 1 - kernel_row if TURNED else kernel_row
            toeplitz = tl.load(weight + (channel * K + weight_row) * K + tap, mask=is_tap, other=0.0)
            if IN_FLOAT32:
                pixels, toeplitz = pixels.to(tl.float32), toeplitz.to(tl.float32)
            total = tl.dot(pixels, toeplitz, total, input_precision=PRECISION)
    if HAS_BIAS:
        total += tl.load(bias + channel).to(tl.float32)
    exists = (image_exists & (row_in_map < height))[:, None] & (column + across < width)[None, :]
    tl.store(y + start + (row_offset[:, None] + (column + across)[None, :]), total.to(y.dtype.element_ty), mask=exists)


@triton.jit
def weight_gradient(x, grad, sums, images, channels, height, width_by_align, parts,
                    K: tl.constexpr, TAPS: tl.constexpr, ALIGN: tl.constexpr, KERNEL_ROWS: tl.constexpr,
                    IN_COLUMNS: tl.constexpr, OUT_COLUMNS: tl.constexpr, IMAGES: tl.constexpr, ROWS: tl.constexpr,
                    PRECISION: tl.constexpr, IN_FLOAT32: tl.constexpr):
    """sums[part, channel] (K, K), float32 = the weight's gradient by one part of the images; grad is that of y.

    Grid: (blocks of KERNEL_ROWS kernel rows, channels, parts). A matrix product sums over IMAGES x ROWS rows of grad, each with
    the row of x that lies KERNEL_ROWS kernel rows away: product[kernel row, c, w] = sum of x[h + kernel row - P, c] * grad[h, w]
    for IN_COLUMNS columns c and OUT_COLUMNS columns w. Tap k of a kernel row is then the sum over c - w + P = k.
    TAPS: K rounded up to a power of two.
    """
    P: tl.constexpr = K // 2
    width = width_by_align * ALIGN
    area = height * width
    first_kernel_row = tl.program_id(0) * KERNEL_ROWS
    channel = tl.program_id(1)
    part = tl.program_id(2)

    # the rows of the product: kernel rows, and input columns for each
    m = tl.arange(0, KERNEL_ROWS * IN_COLUMNS)
    shift = first_kernel_row + m // IN_COLUMNS - P
    is_kernel_row = first_kernel_row + m // IN_COLUMNS < K
    # what it sums over: rows of this part's images, those that meet a row of x through one of the kernel rows at least
    r = tl.arange(0, IMAGES * ROWS)
    r_offset = r // ROWS * (channels * area) + r % ROWS * width
    first_row = tl.maximum(0, P - (first_kernel_row + KERNEL_ROWS - 1))
    last_row = tl.minimum(height, height + P - first_kernel_row)
    steps_down = tl.cdiv(last_row - first_row, ROWS)
    image_blocks = tl.cdiv(images, IMAGES)
    blocks_of_part = tl.cdiv(image_blocks, parts)
    first_step = part * blocks_of_part * steps_down
    last_step = tl.minimum(image_blocks, (part + 1) * blocks_of_part) * steps_down

    across = tl.arange(0, OUT_COLUMNS)
    taps = tl.arange(0, TAPS)
    gradient = tl.zeros((KERNEL_ROWS, TAPS), tl.float32)
    for w in range(0, width, OUT_COLUMNS):
        grad_offset = r_offset[:, None] + (w + across)[None, :]
        for c in range(tl.maximum(0, w - P) // IN_COLUMNS * IN_COLUMNS, tl.minimum(width, w + OUT_COLUMNS + P), IN_COLUMNS):
            in_column = c + m % IN_COLUMNS
            x_offset = ((m // IN_COLUMNS - P) * width + in_column)[:, None] + r_offset[None, :]
            in_x = is_kernel_row & (in_column < width)
            product = tl.zeros((KERNEL_ROWS * IN_COLUMNS, OUT_COLUMNS), tl.float32)
            for step in range(first_step, last_step):
                image = step // steps_down * IMAGES
                row = first_row + step % steps_down * ROWS
                start = (image.to(tl.int64) * channels + channel) * area + row * width
                row_in_map = row + r % ROWS
                exists = (image + r // ROWS < images) & (row_in_map < last_row)
                grads = tl.load(grad + start + grad_offset, mask=exists[:, None] & (w + across < width)[None, :], other=0.0)
                x_row = row_in_map[None, :] + shift[:, None]
                inside = exists[None, :] & (x_row >= 0) & (x_row < height) & in_x[:, None]
                pixels = tl.load(x + (start + first_kernel_row * width) + x_offset, mask=inside, other=0.0)
                if IN_FLOAT32:
                    pixels, grads = pixels.to(tl.float32), grads.to(tl.float32)
                product = tl.dot(pixels, grads, product, input_precision=PRECISION)
            # along the diagonals: the input column that tap k and output column w meet in
            position = taps[:, None] + across[None, :] + (w - P - c)
            meets = (position >= 0) & (position < IN_COLUMNS) & (taps < K)[:, None]
            position = tl.broadcast_to(tl.where(meets, position, 0)[None, :, :], (KERNEL_ROWS, TAPS, OUT_COLUMNS))
            diagonals = tl.gather(tl.reshape(product, (KERNEL_ROWS, IN_COLUMNS, OUT_COLUMNS)), position, 1)
            gradient += tl.sum(tl.where(meets[None, :, :], diagonals, 0.0), 2)
    kernel_row = first_kernel_row + tl.arange(0, KERNEL_ROWS)
    place = ((part * channels + channel).to(tl.int64) * K + kernel_row[:, None]) * K + taps[None, :]
    tl.store(sums + place, gradient, mask=(kernel_row < K)[:, None] & (taps < K)[None, :])
