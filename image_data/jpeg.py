"""What the header of a JPEG says: enough to know which decoder reads it as Pillow does."""
from collections.abc import Sequence
from typing import NamedTuple

# ISO/IEC 10918-1, table B.1: the second byte of a marker
START_OF_SCAN, ADOBE = 0xDA, 0xEE
FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # these are tables and a reserved one
# those with a length that stand before the first scan: tables, frames, DQT, DRI, APP0 ... APP15, COM
SEGMENTS = {0xC4, 0xCC, 0xDB, 0xDD, *range(0xE0, 0xF0), 0xFE} | FRAMES


class JpegHeader(NamedTuple):
    """Of an image: pixels, bits a sample, each component's (horizontal, vertical) sampling factors."""
    width: int
    height: int
    precision: int
    sampling: tuple[tuple[int, int], ...]
    frame: int  # which kind: 0xC0 baseline, 0xC1 extended, 0xC2 progressive; others are rare
    adobe: bool  # an Adobe marker says how the colours are stored


def read_header(data: Sequence[int]) -> JpegHeader | None:
    """The header in the bytes of a file; None where there is none, or not one whole and plain one."""
    if bytes(data[:3]) != b'\xff\xd8\xff':
        return None
    at, frame, adobe = 2, None, False
    while True:
        start = at
        while at < len(data) and data[at] == 0xFF:  # any number of them may pad a marker
            at += 1
        if at == start or at + 3 > len(data):
            return None
        marker, length = data[at], data[at + 1] << 8 | data[at + 2]
        segment, at = bytes(data[at + 3:at + 1 + length]), at + 1 + length
        if marker == START_OF_SCAN:
            return frame and frame._replace(adobe=adobe)
        if marker not in SEGMENTS or length < 2 or at > len(data) or (frame and marker in FRAMES):
            return None
        if marker in FRAMES:
            frame = _read_frame(marker, segment)
        adobe |= marker == ADOBE and segment.startswith(b'Adobe')


def _read_frame(marker: int, segment: bytes) -> JpegHeader | None:
    if len(segment) < 6 or len(segment) != 6 + 3 * segment[5]:
        return None
    precision, height, width = segment[0], *(segment[i] << 8 | segment[i + 1] for i in (1, 3))
    sampling = tuple((factors >> 4, factors & 15) for factors in segment[7::3])
    return JpegHeader(width, height, precision, sampling, marker, False)
