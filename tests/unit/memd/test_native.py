from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from memd import native
from memd.native import build as native_build
from memd.transfer.rows import compiled_rows


def _has_compiler() -> bool:
    try:
        native_build.find_compiler()
    except native_build.BuildError:
        return False
    return True


needs_compiler = pytest.mark.skipif(not _has_compiler(), reason="no C++ compiler")


@needs_compiler
def test_a_built_library_is_found_and_copies_rows(tmp_path: Path) -> None:
    assert native_build.build(tmp_path / "new") == tmp_path / "new" / native_build.LIBRARY_NAME
    copy_rows = compiled_rows(native.open_gather(tmp_path / "new"))
    source = np.arange(600, dtype=np.uint8).reshape(6, 100)
    rows, out = np.array([5, 0, 5]), np.zeros((3, 100), dtype=np.uint8)
    copy_rows(source, rows, out)
    assert np.array_equal(out, source[rows])


@needs_compiler
def test_a_compiler_without_function_versions_builds_one_for_all_processors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "compiler"
    real = " ".join(native_build.find_compiler())
    compiler.write_text(
        f'#!/bin/sh\ncase "$*" in *-DMEMD_LEVELS*) exit 1;; esac\nexec {real} "$@"\n'
    )
    compiler.chmod(0o700)
    monkeypatch.setenv("CXX", str(compiler))
    native_build.build(tmp_path)
    native.open_gather(tmp_path)


@needs_compiler
def test_a_library_of_another_source_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    native_build.build(tmp_path)
    monkeypatch.setattr(native_build, "source_digest", lambda: "0" * 16)
    with pytest.raises(native.NativeError, match="made from another source"):
        native.open_gather(tmp_path)


def test_what_is_no_library_is_refused(tmp_path: Path) -> None:
    with pytest.raises(native.NativeError, match="is not there"):
        native.open_gather(tmp_path)
    (tmp_path / native_build.LIBRARY_NAME).write_bytes(b"not a library")
    with pytest.raises(native.NativeError, match=native_build.LIBRARY_NAME):
        native.open_gather(tmp_path)


def test_without_a_compiler_the_build_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert native_build.main(["--out", str(tmp_path)]) == 1
    assert "no C++ compiler found" in capsys.readouterr().err


@needs_compiler
def test_the_installer_can_run_the_build_by_its_path(tmp_path: Path) -> None:
    script = Path(native_build.__file__)
    done = subprocess.run(
        [sys.executable, "-S", "-I", str(script), "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / native_build.LIBRARY_NAME}\n"
