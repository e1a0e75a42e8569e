"""Heat maps of attention as pictures small enough to live inside a page.

A picture has one colour and says everything by its opacity, so that it suits a light page and a
dark one. The scale is logarithmic and the same for all, so that pictures can be compared.
"""

from __future__ import annotations

import base64
import struct
import zlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["HEAT_COLOUR", "LEAST_SHOWN", "encode_png", "heat_image"]

HEAT_COLOUR = (91, 124, 240)
"""Red, green and blue; stands out on white and on near black."""

LEAST_SHOWN = 1e-4
"""Share of attention that is fully transparent, as is all below; 1 is fully opaque."""


def heat_image(masses: NDArray[np.float32], *, alt: str) -> str:
    """Attention by step and position: a row for each step, the first at the top.

    Args:
        masses: Shares of attention in [0, 1], fp32 [num_rows, num_bins].
        alt: What it shows, in words and numbers; escaped already.

    Returns:
        An `img` element that holds its picture.
    """
    height, width = masses.shape
    pixels = np.empty((height, width, 4), dtype=np.uint8)
    pixels[..., :3] = HEAT_COLOUR
    shown = np.log(np.clip(masses, LEAST_SHOWN, 1.0) / LEAST_SHOWN) / -np.log(LEAST_SHOWN)
    pixels[..., 3] = np.rint(shown * 255)
    data = base64.b64encode(encode_png(pixels)).decode("ascii")
    return (
        f'<img width="{width}" height="{height}" alt="{alt}" title="{alt}" '
        f'src="data:image/png;base64,{data}">'
    )


def encode_png(pixels: NDArray[np.uint8]) -> bytes:
    """A PNG file of RGBA pixels.

    Args:
        pixels: uint8 [height, width, 4].

    Source: PNG specification, third edition, sections 5 (chunks) and 9 (filter type 0: none).
    """

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    height, width, _ = pixels.shape
    # Eight bits a channel, colour type 6 (RGBA), and the only methods there are.
    header = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    rows = np.pad(pixels.reshape(height, width * 4), ((0, 0), (1, 0)))
    image = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows.tobytes(), 9))
    return b"\x89PNG\r\n\x1a\n" + image + chunk(b"IEND", b"")
