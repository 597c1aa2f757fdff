from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.urls import absolute, holds_credentials, is_url, local_path, public


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("s3://bucket/a/b", "s3://bucket/a/b"),
        ("s3://KEY:SECRET@bucket/a", "s3://bucket/a"),
        ("s3://KEY@bucket/a", "s3://bucket/a"),
        ("s3://KEY:SEC%2FRET@bucket/a?region=eu-west-1", "s3://bucket/a?region=eu-west-1"),
        ("s3://KEY:SEC/RET@bucket/a", "s3://…/bucket/a"),
        ("s3://KEY:SEC/RET", "s3://…/RET"),
        ("s3://b/a?secret_key=SECRET&region=x&token=SECRET", "s3://b/a?region=x"),
        ("s3://b/a?endpoint_override=http://127.0.0.1:9000", "s3://b/a?endpoint_override=http://127.0.0.1:9000"),
        ("s3://b/a?endpoint_override=http://u:SECRET@host:9000", "s3://b/a"),
        ("abfss://container@account.dfs.core.windows.net/a?sig=SECRET", "abfss://container@account.dfs.core.windows.net/a"),
        ("abfss://container:SECRET@account/a", "abfss://container@account/a"),
        ("gs://anonymous@bucket/a", "gs://anonymous@bucket/a"),
        ("hdfs://name:8020/a@b", "hdfs://name:8020/a@b"),
        ("S3://KEY:SECRET@bucket/a", "S3://bucket/a"),
        ("simplecache::s3://KEY:SECRET@bucket/a", "simplecache::s3://bucket/a"),
        ("http://[::1]:9000/a", "http://[::1]:9000/a"),
        ("http://user:SECRET@[::1]:9000/a", "http://user@[::1]:9000/a"),
        ("http://[fe80::1%25eth0]/a", "http://[fe80::1%25eth0]/a"),
        ("s3://KEY:SECR]ET/SECRET@bucket/a", "s3://…/bucket/a"),
        ("/a/path?secret=no", "/a/path?secret=no"),
    ],
)  # fmt: skip
def test_what_may_be_shown(url: str, shown: str) -> None:
    assert public(url) == shown
    assert public(shown) == shown
    assert holds_credentials(url) == (url != shown)


def test_paths_and_urls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute("a") == str(tmp_path / "a") and not is_url("a")
    assert absolute("s3://bucket/a/?region=x/") == "s3://bucket/a?region=x/"
    assert local_path("file:///a%20b/c") == Path("/a b/c")
    assert local_path("s3://b/c") == "s3://b/c" and local_path(tmp_path) == tmp_path
