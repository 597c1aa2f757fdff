from __future__ import annotations

import io

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from pipelines.png import decode_png, decode_png_window, encode_png
from tests.pipelines.pairs import piece

SHARP = piece(0, 40, 56)
IMAGES = arrays(np.uint8, st.tuples(st.integers(1, 20), st.integers(1, 20), st.just(3)))


@given(IMAGES)
def test_png_in_memory_is_exact(image: np.ndarray) -> None:
    encoded = encode_png(image)
    decoded = decode_png(encoded)
    assert decoded.dtype == np.uint8 and np.array_equal(decoded, image)
    # Other programs see the same RGB.
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(encoded))), image)
    assert np.array_equal(cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR)[..., ::-1], image)


@given(IMAGES, st.data())
def test_a_window_is_a_part_of_the_whole(image: np.ndarray, data: st.DataObject) -> None:
    bounds = []
    for side in image.shape[:2]:
        start = data.draw(st.integers(0, side - 1))
        bounds.append(slice(start, data.draw(st.integers(start + 1, side))))
    assert np.array_equal(decode_png_window(encode_png(image), *bounds), image[bounds[0], bounds[1]])


def test_png_of_a_view_and_from_a_view() -> None:
    view = SHARP[::2, ::-1]
    assert np.array_equal(decode_png(memoryview(encode_png(view))), view)


@pytest.mark.parametrize("options", [{}, {"optimize": True}, {"compress_level": 0}])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L"])
def test_pngs_of_other_programs(mode: str, options: dict[str, object]) -> None:
    file = io.BytesIO()
    image = Image.fromarray(SHARP).convert(mode)
    image.save(file, format="PNG", **options)
    expected = np.asarray(image.convert("RGB"))
    assert np.array_equal(decode_png(file.getvalue()), expected)
    window = decode_png_window(file.getvalue(), slice(3, 9), slice(50, 56))
    assert np.array_equal(window, expected[3:9, 50:56])


def test_a_bit_flipped_anywhere_never_gives_other_pixels() -> None:
    encoded = encode_png(SHARP)
    refused = 0
    for at in range(len(encoded)):
        damaged = bytearray(encoded)
        damaged[at] ^= 1 << at % 8
        try:
            image = decode_png(bytes(damaged))
        except ValueError:
            refused += 1
        else:
            assert np.array_equal(image, SHARP), f"byte {at}"
    assert refused > 0.95 * len(encoded)


def test_truncated_anywhere() -> None:
    encoded = encode_png(SHARP)
    for length in range(0, len(encoded) - 12, 7):  # its end mark says nothing of the pixels
        with pytest.raises(ValueError, match="image|PNG|pixels"):
            decode_png(encoded[:length])


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n"])
def test_bytes_that_are_no_image(content: bytes) -> None:
    with pytest.raises(ValueError, match="not an image"):
        decode_png(content)
