from __future__ import annotations

import subprocess
import sys

import pytest

import nafnet_core


@pytest.mark.parametrize("name", nafnet_core.__all__)
def test_every_public_name_is_there(name: str) -> None:
    # They are imported on first use, from a table that must keep up with `__all__`.
    assert getattr(nafnet_core, name) is not None


def test_unknown_name_is_refused() -> None:
    with pytest.raises(AttributeError, match="'nafnet_core' has no attribute 'NAFNett'"):
        nafnet_core.NAFNett  # noqa: B018


def test_importing_the_package_does_not_import_torch() -> None:
    # Readers of patches and the command line's help would pay seconds and hundreds of MiB for it.
    code = "import sys, nafnet_core; print(sorted({'torch', 'ray', 'mlflow', 'cv2'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
