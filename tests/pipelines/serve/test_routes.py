"""The routes: what comes back, what is refused and how, who may ask."""

from __future__ import annotations

import ast
import io
import struct
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nafnet_core import save_model
from nafnet_core.colour import with_colours_of
from nafnet_core.reduced import merged, reduced
from pipelines import Restorer
from pipelines.restorer import RestoreSettings
from pipelines.serve import app
from pipelines.serve.service import Service
from pipelines.serve.settings import digest_of
from tests.nafnet_core.networks import network_that_breaks, photo
from tests.pipelines.serve.clients import ask, assert_clear, encoded, form, restore
from tests.pipelines.serve.services import routes

_TOKEN = "a-token-of-a-test-0123"
_MAX_MIB = 1


@pytest.fixture(scope="module")
def running(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Service]]:
    workspace = tmp_path_factory.mktemp("workspace")
    with routes(model=str(weights), workspace=workspace, max_mib=_MAX_MIB, max_megapixels=1) as pair:
        yield pair


@pytest.fixture(scope="module")
def address(running: tuple[str, Service]) -> str:
    return running[0]


@pytest.fixture(scope="module")
def restorer(weights: Path) -> Restorer:
    return Restorer(str(weights), RestoreSettings(precision="fp32", tile_px=1024))


def test_an_image_comes_back_restored(address: str, restorer: Restorer) -> None:
    image = photo(90, 130)
    answer = restore(address, encoded(image))
    assert answer.status == 200 and answer.headers["content-type"] == "image/png"
    assert np.array_equal(answer.image, restorer(image)) and not np.array_equal(answer.image, image)
    headers = answer.headers
    assert headers["x-nafnet-model"] == "model.safetensors" and len(headers["x-nafnet-digest"]) == 64
    assert 0 < float(headers["x-nafnet-network-seconds"]) < 10
    assert float(headers["x-nafnet-queue-seconds"]) >= 0
    assert (headers["x-nafnet-tiles"], headers["x-nafnet-tiles-kept"]) == ("1", "0")
    assert len([float(value) for value in headers["x-nafnet-colour-shift"].split(",")]) == 3


def test_a_form_is_taken_and_its_file_name_means_nothing(address: str, restorer: Restorer) -> None:
    body, content_type = form(encoded(photo(40, 50)))
    answer = restore(address, body, Content_Type=content_type)
    assert np.array_equal(answer.image, restorer(photo(40, 50)))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "BMP"])
def test_the_answer_has_the_uploads_format(address: str, kind: str) -> None:
    answer = restore(address, encoded(photo(40, 50), kind), Content_Type="application/octet-stream")
    assert answer.status == 200, answer.content
    assert Image.open(io.BytesIO(answer.content)).format == kind
    assert answer.image.shape == (40, 50, 3)


def test_format_and_quality(address: str) -> None:
    sizes = {}
    for quality in (10, 95):
        answer = restore(address, encoded(photo(80, 80)), f"?format=jpeg&quality={quality}")
        assert answer.headers["content-type"] == "image/jpeg"
        sizes[quality] = len(answer.content)
    assert 2 * sizes[10] < sizes[95]


def test_colours_and_scale(address: str, restorer: Restorer) -> None:
    image = photo(120, 160)
    small = reduced(image, 0.5)
    expected = with_colours_of(image, merged(image, small, restorer(small)))
    answer = restore(address, encoded(image), "?keep_colour=true&scale=0.5")
    assert np.array_equal(answer.image, expected)
    assert not np.array_equal(answer.image, restorer(image))


def test_exif_icc_alpha_gray_and_16_bit_are_kept(address: str) -> None:
    exif = Image.Exif()
    exif[0x010F], exif[0x0112] = "a camera", 6
    answer = restore(address, encoded(photo(40, 60), "JPEG", exif=exif, icc_profile=b"a profile" * 20))
    with Image.open(io.BytesIO(answer.content)) as image:
        assert image.size == (40, 60), "upright"
        assert image.getexif()[0x010F] == "a camera" and image.getexif()[0x0112] == 1
        assert image.info["icc_profile"] == b"a profile" * 20
    png = restore(
        address, encoded(photo(40, 60), "JPEG", exif=exif, icc_profile=b"a profile" * 20), "?format=png"
    )
    with Image.open(io.BytesIO(png.content)) as image:
        assert image.getexif()[0x010F] == "a camera" and image.info["icc_profile"] == b"a profile" * 20
    alpha = np.dstack([photo(30, 30), np.full((30, 30), 77, np.uint8)])
    assert (restore(address, encoded(alpha)).image[..., 3] == 77).all()
    assert restore(address, encoded(photo(30, 30)[..., 0])).image.ndim == 2
    deep = Image.fromarray(photo(30, 30)[..., 0].astype(np.uint16) * 257)
    file = io.BytesIO()
    deep.save(file, "PNG")
    assert restore(address, file.getvalue()).image.dtype == np.uint16
    whole, lossy = restore(address, file.getvalue()), restore(address, file.getvalue(), "?format=jpeg")
    assert "x-nafnet-notes" not in whole.headers and lossy.headers["x-nafnet-notes"] == "16 bit became 8"
    assert restore(address, encoded(alpha), "?format=jpeg").headers["x-nafnet-notes"] == "alpha is left out"


def _declared(width: int, height: int) -> bytes:
    """A PNG of a few bytes that declares these sides."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


def _animated() -> bytes:
    file = io.BytesIO()
    frames = [Image.fromarray(photo(20, 20)), Image.fromarray(255 - photo(20, 20))]
    frames[0].save(file, "WEBP", save_all=True, append_images=frames[1:])
    return file.getvalue()


_PNG = encoded(photo(30, 40))
_BAD: dict[str, tuple[bytes, str, str, int]] = {
    "empty": (b"", "", "image/png", 400),
    "text": (b"hello, world", "", "image/png", 415),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "", "image/svg+xml", 415),
    "gif": (encoded(photo(9, 9)[..., 0], "GIF"), "", "image/gif", 415),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "", "image/x-eps", 415),
    "truncated": (encoded(photo(200, 200))[:20000], "", "image/png", 422),
    "truncated jpeg": (encoded(photo(200, 200), "JPEG")[:3000], "", "image/jpeg", 422),
    "animated": (_animated(), "", "image/webp", 422),
    "too many pixels": (_declared(30000, 30000), "", "image/png", 422),
    "a bomb": (_declared(2**31 - 1, 2**31 - 1), "", "image/png", 422),
    "no pixels": (_declared(0, 10), "", "image/png", 415),
    "too large": (b"\0" * (_MAX_MIB * 2**20 + 1), "", "image/png", 413),
    "text as type": (_PNG, "", "text/plain", 415),
    "curl's own type": (_PNG, "", "application/x-www-form-urlencoded", 415),
    "no boundary": (_PNG, "", "multipart/form-data", 400),
    "no form": (_PNG, "", "multipart/form-data; boundary=x", 400),
    "an empty form": (*(form()[0], ""), form()[1], 400),
    "two files": (form(_PNG, _PNG)[0], "", form()[1], 400),
    "unknown option": (_PNG, "?formt=png", "image/png", 400),
    "unknown format": (_PNG, "?format=gif", "image/png", 400),
    "an option twice": (_PNG, "?quality=1&quality=2", "image/png", 400),
    "quality": (_PNG, "?quality=101", "image/png", 400),
    "quality in Bengali": (_PNG, "?quality=%E0%A7%AA", "image/png", 400),
    "scale": (_PNG, "?scale=nan", "image/png", 400),
    "keep_colour": (_PNG, "?keep_colour=maybe", "image/png", 400),
    "a path as format": (_PNG, "?format=../../x", "image/png", 400),
    "a model": (_PNG, "?model=../../x", "image/png", 400),
}


@pytest.mark.parametrize("case", _BAD)
def test_bad_input_gets_a_clear_answer(address: str, case: str) -> None:
    body, query, content_type, status = _BAD[case]
    answer = restore(address, body, query, Content_Type=content_type)
    assert answer.status == status, answer.content
    assert_clear(answer)


def test_the_nearest_option_is_named(address: str) -> None:
    assert "format" in restore(address, _PNG, "?formt=png").told["fix"]
    assert restore(address, _BAD["gif"][0]).told["got"] == "GIF"
    assert restore(address, b"x").told["got"] == "1 byte of something else"


def test_a_body_without_a_length_ends_at_the_limit(address: str) -> None:
    sent = 0

    def chunks() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(64):
            sent += 2**20
            yield b"\0" * 2**20

    answer = restore(address, chunks())
    assert answer.status == 413
    assert_clear(answer)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/restore", 405),
        ("POST", "/", 405),
        ("GET", "/nothing", 404),
        ("GET", "/index.html", 404),
        ("GET", "/..%2f..%2fetc%2fpasswd", 404),
        ("GET", "/page.css/../app", 404),
        ("GET", "/%00", 404),
    ],
)
def test_other_places(address: str, method: str, path: str, status: int) -> None:
    answer = ask(address, path, method=method)
    assert answer.status == status
    assert_clear(answer)


def test_the_page_needs_nothing_from_elsewhere(address: str) -> None:
    for path in ("/", "/docs", "/page.css", "/page.js", "/docs.js", "/docs.css", "/icon.svg"):
        answer = ask(address, path)
        assert answer.status == 200
        text = answer.content.decode().replace("http://www.w3.org/2000/svg", "")
        assert "http:" not in text and "https:" not in text and "//cdn" not in text
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in answer.headers


def test_openapi_tells_the_options(address: str) -> None:
    told = ask(address, "/openapi.json").told["paths"]["/v1/restore"]["post"]
    assert {each["name"] for each in told["parameters"]} == {"format", "quality", "keep_colour", "scale"}
    assert set(told["requestBody"]["content"]) == {"image/*", "multipart/form-data"}
    assert set(told["responses"]["429"]["headers"]) == {"Retry-After"}


def _statuses_in_the_code() -> set[int]:
    """Of `Refusal(404, …)`, `Refusal.of(422, …)` and `status_code=503`, wherever they stand."""
    found = set()
    for file in Path(app.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call):
                continue
            is_refusal = ast.unparse(node.func) in ("Refusal", "Refusal.of")
            given = node.args[:1] if is_refusal else []
            given += [each.value for each in node.keywords if each.arg == "status_code"]
            found |= {each.value for part in given for each in ast.walk(part)
                      if isinstance(each, ast.Constant) and isinstance(each.value, int)}  # fmt: skip
    return found - {200}


def test_openapi_and_the_docs_tell_each_status(address: str) -> None:
    in_code = _statuses_in_the_code()
    assert {400, 401, 403, 413, 429, 500, 503, 504} <= in_code, "the search finds them"
    paths = ask(address, "/openapi.json").told["paths"]
    of_restore = set(map(int, paths["/v1/restore"]["post"]["responses"]))
    assert of_restore == in_code | {200}
    for path, own in (("/v1/model", {401}), ("/metrics", {401}), ("/healthz", set()), ("/readyz", {503})):
        assert set(map(int, paths[path]["get"]["responses"])) == own | {200, 403, 500}
    for each in (paths["/v1/restore"]["post"], *(told["get"] for told in paths.values() if "get" in told)):
        for status, response in each["responses"].items():
            (body,) = response["content"].values()
            refused = {"problem", "expected", "got", "fix"} <= set(body["schema"].get("properties", {}))
            assert refused or status == "200" or (status, each["operationId"][:6]) == ("503", "readyz")
    table = (Path(__file__).parents[3] / "docs" / "serving.md").read_text()
    for status in in_code | {404, 405}:
        assert f"| {status} |" in table, status


@pytest.mark.parametrize("path", ["/", "/healthz", "/readyz", "/docs", "/page.css"])
def test_head_is_get_without_a_body(address: str, path: str) -> None:
    head, whole = ask(address, path, method="HEAD"), ask(address, path)
    assert head.status == whole.status == 200 and head.content == b"" and whole.content
    assert {**head.headers, "date": ""} == {**whole.headers, "date": ""}


def test_tiles_that_broke_are_counted(weights: Path, tmp_path: Path) -> None:
    image = photo(256, 320)
    with routes(model=str(weights), workspace=tmp_path) as (address, service):
        line = 'nafnet_tiles_broken_total{mended_by="%s",replica="0"} %s.0'
        for redone, kept in ((0, 0), (1, 0), (1, 1)):
            told = ask(address, "/metrics").content.decode()
            assert line % ("no local statistics", redone) in told
            assert line % ("keeping the input", kept) in told
            # Not through the registry, where a model that breaks the known image would be refused.
            path = tmp_path / f"{redone}.safetensors"
            save_model(
                network_that_breaks(image, only_locally=not redone), path, metadata={"train_patch_px": 16}
            )
            broken = Restorer(str(path), service.network.served.restorer.settings)
            service.network.swap(replace(service.network.served, restorer=broken))
            assert restore(address, encoded(image)).status == 200


def test_states_and_metrics(address: str) -> None:
    restore(address, _PNG)
    assert ask(address, "/healthz").told == {"status": "alive"}
    ready = ask(address, "/readyz").told
    assert ready["status"] == "ready" and ready["refused"] is None
    model = ask(address, "/v1/model").told
    assert model["pinned"] == {
        "backend": "torch", "precision": "fp32", "tile_px": 1024, "tile_batch": 1,
        "local_statistics_px": 32, "device": "cpu",
    }  # fmt: skip
    assert model["limits"]["max_mib"] == _MAX_MIB and model["model"] == ready["model"]
    lines = ask(address, "/metrics").content.decode()
    for name in (
        'nafnet_requests_total{replica="0",status="200"}',
        "nafnet_request_seconds_bucket",
        "nafnet_queue_length",
        "nafnet_tiles_total",
        "nafnet_batches_total",
        "nafnet_champions_refused_total",
        f'digest="{ready["model"]["digest"]}"',
    ):
        assert name in lines, name


def test_other_names_and_other_sites_are_kept_out_without_a_token(address: str) -> None:
    for host in ("evil.example", "127.0.0.1.evil.example:80", "192.168.0.7", "[2001:db8::1]:8000", ""):
        answer = restore(address, _PNG, Host=host)
        assert answer.status in (400, 403), host
    assert restore(address, _PNG, Host="localhost:8000").status == 200
    before = _counted(address, 403)
    assert restore(address, _PNG, Sec_Fetch_Site="cross-site").status == 403
    assert _counted(address, 403) == before + 1


def _counted(address: str, status: int) -> float:
    lines = ask(address, "/metrics").content.decode().splitlines()
    found = [line for line in lines if line.startswith("nafnet_requests_total") and f'"{status}"' in line]
    return float(found[0].rpartition(" ")[2]) if found else 0.0


def test_the_token(weights: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "model": str(weights),
        "workspace": tmp_path,
        "token_digest": digest_of(_TOKEN),
    }
    with routes(**settings) as (address, _):
        for given in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {_TOKEN}"},
                      {"Authorization": "Bearer é"}, {"Authorization": f"Bearer {_TOKEN}x"}):  # fmt: skip
            for path, body in (("/v1/restore", _PNG), ("/v1/model", None), ("/metrics", None)):
                answer = ask(address, path, body, **{"Content_Type": "image/png", **given})
                assert answer.status == 401 and answer.headers["www-authenticate"].startswith("Bearer")
                assert_clear(answer)
        assert restore(address, _PNG, Authorization=f"Bearer {_TOKEN}", Host="photos.example").status == 200
        for path in ("/healthz", "/readyz", "/", "/docs", "/openapi.json"):
            assert ask(address, path).status == 200
