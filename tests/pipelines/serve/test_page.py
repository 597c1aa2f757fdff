"""The page in headless Chromium: upload, comparison, zoom, download, errors in words, the token."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.serve.settings import digest_of
from tests.nafnet_core.networks import photo
from tests.pipelines.serve.chromium import CHROMIUM, Browser
from tests.pipelines.serve.clients import encoded, restore
from tests.pipelines.serve.conftest import MAX_MEGAPIXELS, MAX_MIB
from tests.pipelines.serve.services import Command, routes

pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium"),
]
_HEIGHT, _WIDTH = 300, 1300  # wider than the window at 1:1, and no larger than that needs
_RESULT = "!document.getElementById('result').hidden && document.getElementById('after').naturalWidth > 0"
_ERROR = "!document.getElementById('error').hidden"
_CUT = r"Number(document.getElementById('after').style.clipPath.match(/([\d.]+)px\)$/)[1])"


def _box(browser: Browser, element: str) -> tuple[float, float, float, float]:
    """Left, top, width and height of an element in the window."""
    box = f"(({{x, y, width, height}}) => [x, y, width, height])({element}.getBoundingClientRect())"
    return tuple(browser.value(box))


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


@pytest.fixture
def browser(chromium: Browser, command: Command) -> Iterator[Browser]:
    """On the page of the real service; it must fetch nothing from elsewhere and log no error."""
    chromium.look(width=1200, height=850)
    chromium.open(f"{command.address}/")
    chromium.wait("document.getElementById('model').textContent.includes('nafnet-deblur version')")
    yield chromium
    asked = [event["params"]["request"]["url"] for event in chromium.events
             if event["method"] == "Network.requestWillBeSent"]  # fmt: skip
    assert asked and all(url.startswith((command.address, "blob:", "data:")) for url in asked), asked
    assert not [event for event in chromium.events if event["method"] == "Runtime.exceptionThrown"]


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "holiday.png"
    path.write_bytes(encoded(photo(_HEIGHT, _WIDTH)[:, ::-1], "PNG"))
    assert path.stat().st_size < MAX_MIB * 2**20
    return path


@pytest.fixture
def restored(browser: Browser, picture: Path) -> Browser:
    browser.choose("#file", picture)
    browser.wait(_RESULT)
    # Said a moment after the result is shown, which moves what is below it.
    browser.wait("document.getElementById('status').textContent.startsWith('Restored in')")
    return browser


def test_a_photo_is_restored_and_told_of(restored: Browser) -> None:
    told = restored.value("document.getElementById('facts-list').innerText")
    assert "nafnet-deblur version" in told and "In the network" in told and " s" in told
    assert restored.value("document.getElementById('status').textContent").endswith(
        "to see before and after."
    )
    assert "levels of 255" in told and restored.value("document.getElementById('notes').hidden")
    assert restored.value("document.getElementById('status').getAttribute('aria-live')") == "polite"
    sizes = restored.value("['before', 'after'].map((id) => document.getElementById(id).naturalWidth)")
    assert sizes == [_WIDTH, _WIDTH]


def test_the_slider_by_mouse_and_by_keyboard(restored: Browser) -> None:
    width = restored.value("document.getElementById('view').clientWidth")
    assert restored.value(_CUT) == pytest.approx(width / 2, abs=1)
    left, top, _, height = _box(restored, "document.getElementById('view')")
    middle = top + min(height, 300) / 2
    restored.drag((left + width * 0.3, middle), (left + width * 0.8, middle))
    assert restored.value(_CUT) == pytest.approx(0.8 * width, abs=width / 100)
    restored.value("document.getElementById('slider').focus()")
    restored.press("Home")
    assert restored.value(_CUT) == 0
    for _ in range(3):
        restored.press("ArrowRight")
    assert restored.value(_CUT) == pytest.approx(0.03 * width, abs=1)
    assert "3 % before" in restored.value("document.getElementById('slider').getAttribute('aria-valuetext')")
    # What is seen changes with it.
    shown = []
    for value in (0, 100):
        restored.value(f"move({value})")
        shown.append(np.asarray(Image.open(io.BytesIO(restored.picture())).convert("RGB"), int))
    assert np.abs(shown[0] - shown[1]).max() > 10


def test_one_to_one_and_moving(restored: Browser) -> None:
    restored.value("document.getElementById('full').click()")
    assert restored.value("document.getElementById('full').getAttribute('aria-pressed')") == "true"
    assert restored.value("document.getElementById('after').getBoundingClientRect().width") == _WIDTH
    assert restored.value("document.getElementById('after').getBoundingClientRect().height") == _HEIGHT
    left = restored.value("document.getElementById('view').scrollLeft")
    assert left > 0, "it begins at the middle"
    before = restored.value(_CUT)
    restored.value("document.getElementById('view').focus()")
    restored.press("ArrowLeft")
    restored.wait(f"document.getElementById('view').scrollLeft < {left}")
    restored.wait(f"{_CUT} < {before}")  # the divider stands still in the window, not on the photo


def test_the_download_is_what_the_service_answered(
    restored: Browser, picture: Path, command: Command
) -> None:
    restored.value("document.getElementById('download').click()")
    restored.wait("true")
    path = restored.downloads / "holiday-restored.png"
    for _ in range(200):
        if path.exists() and path.stat().st_size:
            break
        restored.wait("new Promise((done) => setTimeout(() => done(true), 50))")
    content = restore(command.address, picture.read_bytes()).content
    assert path.read_bytes() == content
    path.unlink()


def test_what_the_format_could_not_hold_is_told(browser: Browser, tmp_path: Path) -> None:
    clear = tmp_path / "clear.png"
    clear.write_bytes(encoded(np.dstack([photo(40, 60), np.full((40, 60), 99, np.uint8)])))
    browser.value("document.getElementById('format').value = 'jpeg'")
    browser.choose("#file", clear)
    browser.wait(_RESULT)
    told = browser.value("document.getElementById('notes').innerText")
    assert told == "JPEG could not hold all of the photo: alpha is left out."


def test_a_photo_that_the_browser_cannot_show_has_nothing_to_compare(
    browser: Browser, tmp_path: Path
) -> None:
    tiff = tmp_path / "scan.tif"
    tiff.write_bytes(encoded(photo(40, 60), "TIFF"))
    browser.choose("#file", tiff)
    browser.wait("!document.getElementById('unseen').hidden")
    browser.wait("document.getElementById('status').textContent.endsWith(' s.')")


def test_errors_are_told_in_words(browser: Browser, tmp_path: Path) -> None:
    bad = tmp_path / "notes.png"
    bad.write_bytes(b"no image at all")
    browser.choose("#file", bad)
    browser.wait(_ERROR)
    told = browser.value("document.getElementById('error').innerText")
    assert "Not an image" in told and "JPEG" in told and "Export it" in told
    assert browser.value("document.getElementById('error').getAttribute('role')") == "alert"
    assert browser.value("document.getElementById('result').hidden")
    large = tmp_path / "large.png"
    large.write_bytes(b"\0" * (MAX_MIB * 2**20 + 1))
    browser.choose("#file", large)
    browser.wait("document.getElementById('error').innerText.includes('too large')")
    wide = tmp_path / "wide.png"
    wide.write_bytes(encoded(np.zeros((2000, 1000 * MAX_MEGAPIXELS), np.uint8)))
    browser.choose("#file", wide)
    browser.wait("document.getElementById('error').innerText.includes('Too many pixels')")


def test_a_dropped_and_a_pasted_photo(browser: Browser) -> None:
    for kind in ("drop", "paste"):
        browser.value(
            """(async () => {
              const canvas = Object.assign(document.createElement('canvas'), {width: 40, height: 30});
              canvas.getContext('2d').fillRect(5, 5, 9, 9);
              const blob = await new Promise((done) => canvas.toBlob(done));
              const data = new DataTransfer();
              data.items.add(new File([blob], 'KIND.png', {type: 'image/png'}));
              dispatchEvent('KIND' === 'drop'
                ? new DragEvent('drop', {dataTransfer: data, cancelable: true})
                : new ClipboardEvent('paste', {clipboardData: data}));
            })()""".replace("KIND", kind)
        )
        browser.wait(f"document.getElementById('download').download === '{kind}-restored.png'")


def test_a_phone_shows_all_of_it_in_the_dark_too(restored: Browser) -> None:
    grounds = []
    for scheme in ("light", "dark"):
        restored.look(width=360, height=740, scheme=scheme, is_phone=True)
        restored.wait("document.documentElement.scrollWidth === 360")
        beyond = "[...document.querySelectorAll('main *, header *')].filter((each) => "
        beyond += "!each.closest('#stage') && each.getBoundingClientRect().right > 360.5).length"
        restored.wait(f"({beyond}) === 0")
        grounds.append(restored.value("getComputedStyle(document.body).backgroundColor"))
        heights = "['view', 'overlay'].map((id) => document.getElementById(id).clientHeight)"
        restored.wait(f"(([view, overlay]) => Math.abs(view - overlay) <= 1)({heights})")
    assert grounds[0] != grounds[1]
    restored.value("document.getElementById('view').scrollIntoView()")
    left, top, width, _ = _box(restored, "document.querySelector('#divider span')")
    assert width >= 44, "large enough for a finger"
    restored.touch((left + 20, top + 20), (left - 80, top + 20))
    assert float(restored.value("document.getElementById('slider').value")) < 30


def test_all_that_is_used_can_be_reached_by_keyboard_and_has_a_name(restored: Browser) -> None:
    seen = []
    restored.value("document.activeElement.blur()")
    for _ in range(12):
        restored.press("Tab")
        seen.append(restored.value("document.activeElement.id || document.activeElement.tagName"))
    assert {"file", "SUMMARY", "fit", "full", "download", "view", "slider"} <= set(seen), seen
    tree = restored.call("Accessibility.getFullAXTree")["nodes"]
    roles = ("button", "slider", "link", "ComboBoxMenuSelect", "checkbox", "image")
    seen_by_readers = [node for node in tree if not node.get("ignored") and node["role"]["value"] in roles]
    nameless = [node for node in seen_by_readers if not node.get("name", {}).get("value")]
    assert not nameless
    assert {"slider", "link", "button"} <= {node["role"]["value"] for node in tree if "role" in node}


def test_the_token_is_asked_for(chromium: Browser, weights: Path, tmp_path: Path) -> None:
    picture = tmp_path / "small.png"
    picture.write_bytes(encoded(photo(40, 40)))
    digest = digest_of("a-token-of-a-test-0123")
    with routes(model=str(weights), workspace=tmp_path, token_digest=digest) as (address, _):
        chromium.look(width=1200, height=850)
        chromium.open(f"{address}/")
        chromium.wait("!document.getElementById('token-row').hidden")
        chromium.choose("#file", picture)
        chromium.wait(_ERROR)
        assert "No token" in chromium.value("document.getElementById('error').innerText")
        assert chromium.value("document.activeElement.id") == "token"
        chromium.value("document.getElementById('token').value = 'a-token-of-a-test-0123'")
        chromium.value("document.getElementById('token').dispatchEvent(new Event('change'))")
        chromium.wait("document.getElementById('model').textContent.includes('model.safetensors')")
        chromium.choose("#file", picture)
        chromium.wait(_RESULT)


def test_the_interface_is_told_without_a_network(browser: Browser, command: Command) -> None:
    browser.open(f"{command.address}/docs")
    browser.wait("document.body.innerText.includes('keep_colour')")
    told = browser.value("document.body.innerText")
    assert "/v1/restore" in told and "Retry-After" in told and "curl -F image=@photo.jpg" in told
