from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image

from hetero_sglang.report.heat_image import HEAT_COLOUR, encode_png, heat_image
from tests.html_page import Page


def test_a_picture_comes_back_as_it_was() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 3, 4), dtype=np.uint8)

    image = Image.open(io.BytesIO(encode_png(pixels)))

    assert (image.format, image.mode) == ("PNG", "RGBA")
    np.testing.assert_array_equal(np.asarray(image), pixels)


def test_opacity_is_the_logarithm_of_the_mass() -> None:
    masses = np.array([[0.0, 1e-5, 1e-4], [1e-3, 1e-2, 1.0]], dtype=np.float32)

    (shown,) = Page(heat_image(masses, alt="what it shows")).images

    assert (shown["width"], shown["height"], shown["alt"]) == ("3", "2", "what it shows")
    kind, _, data = shown["src"].partition(",")
    assert kind == "data:image/png;base64"
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
    np.testing.assert_array_equal(pixels[..., 3], [[0, 0, 0], [64, 128, 255]])
    assert (pixels[..., :3] == HEAT_COLOUR).all()


def test_a_mass_that_rounding_put_above_all_is_all() -> None:
    (shown,) = Page(heat_image(np.array([[1.0 + 1e-6]], dtype=np.float32), alt="")).images

    picture = Image.open(io.BytesIO(base64.b64decode(shown["src"].partition(",")[2])))

    assert picture.getpixel((0, 0)) == (*HEAT_COLOUR, 255)
