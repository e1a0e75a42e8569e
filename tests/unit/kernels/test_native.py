"""Building and loading the compiled kernels, and what happens where there are none."""

from __future__ import annotations

import shutil
import subprocess
import sys
from unittest import mock

import pytest
import torch

import hetero_kernels
from hetero_kernels import DecodeBatch, DecodeLayer, build_native, native
from hetero_kernels.testing import make_decode_case

needs_library = pytest.mark.skipif(native.library() is None, reason=native.native_status())


@pytest.fixture
def absent(monkeypatch):
    """No compiled library can be found."""
    monkeypatch.setattr(native, "_load", native._load.__wrapped__)
    with mock.patch.object(
        native, "open_library", side_effect=native.NativeError("library.so is not there")
    ):
        yield


@pytest.fixture
def library_dir(tmp_path):
    """A copy of the compiled libraries."""
    shutil.copytree(build_native.DEFAULT_OUT_DIR, tmp_path / "copy")
    return tmp_path / "copy"


@needs_library
def test_status_names_the_best_level_of_this_processor():
    library = native.library()
    assert library.level in native.runnable_levels()
    assert native.native_status().startswith(f"native {library.level}")


def test_torch_computes_where_nothing_is_compiled(absent):
    assert native.native_status().startswith("torch (library.so is not there")
    assert "python -m hetero_kernels.build_native" in native.native_status()
    case = make_decode_case(
        prompt_lens=[9], kept_lens=[[4]], generated=[1], head_map=[-1, 0], group_size=2, head_dim=16
    )
    launcher = DecodeLayer(case.layer)
    assert launcher.impl == "torch"
    batch = DecodeBatch(case.rows, case.seq_lens, case.token_ids)
    launcher.append(case.k, case.v, None, batch)
    assert launcher.attend(case.q, torch.empty_like(case.q), batch).isfinite().all()


def test_asking_for_what_is_not_compiled_is_refused(absent):
    with pytest.raises(ValueError, match="is not there"):
        hetero_kernels.top_positions(torch.zeros(1, 4), 2, impl="native")


def test_flags_of_a_level_are_part_of_the_digest(monkeypatch):
    before = build_native.source_digest()
    other = build_native._LEVEL_OPTIONS | {"x86-64-v4-bf16": ("-march=x86-64-v4",)}
    monkeypatch.setattr(build_native, "_LEVEL_OPTIONS", other)
    assert build_native.source_digest() != before


def test_operations_without_compiled_kernels_say_so():
    heads = torch.zeros(1, 1, 1, 16)
    positions = torch.zeros(1, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match="no impl='native'; auto takes torch"):
        hetero_kernels.window_scores(heads, heads[0], 1.0, impl="native")
    with pytest.raises(ValueError, match="no impl='native'; auto takes torch"):
        hetero_kernels.plan_delta(positions, positions, 1, impl="native")


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="impl must be"):
        hetero_kernels.top_positions(torch.zeros(1, 4), 2, impl="fast")


@needs_library
def test_a_library_of_other_sources_is_refused(library_dir, tmp_path):
    sources = tmp_path / "csrc"
    shutil.copytree(build_native.SOURCE_DIR, sources)
    (sources / "api.cpp").write_text("// changed\n")
    digest = build_native.source_digest(sources)
    with (
        mock.patch.object(build_native, "source_digest", return_value=digest),
        pytest.raises(native.NativeError, match="other sources"),
    ):
        native.open_library(native.library().level, library_dir)


@needs_library
def test_a_library_of_another_interface_is_refused(monkeypatch, library_dir):
    monkeypatch.setattr(native, "ABI_VERSION", -1)
    with pytest.raises(native.NativeError, match="interface version"):
        native.open_library(native.library().level, library_dir)


@needs_library
def test_a_struct_of_another_size_is_refused(monkeypatch, library_dir):
    monkeypatch.setattr(native, "BatchStruct", native.ScoreStruct)
    with pytest.raises(native.NativeError, match="structs of other sizes"):
        native.open_library(native.library().level, library_dir)


def test_a_file_that_is_no_library_is_refused(tmp_path):
    level = build_native.levels()[-1]
    (tmp_path / build_native.library_name(level)).write_text("not a library")
    with pytest.raises(native.NativeError, match=build_native.library_name(level)):
        native.open_library(level, tmp_path)


def test_without_a_compiler_the_build_says_so(monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(build_native.BuildError, match=r"no C\+\+ compiler"):
        build_native.build(tmp_path)


def test_a_compiler_that_fails_is_quoted(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(build_native.BuildError, match="false failed"):
        build_native.build(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")
def test_a_level_that_the_compiler_does_not_know_is_left_out(monkeypatch, tmp_path):
    sources = tmp_path / "csrc"
    sources.mkdir()
    (sources / "api.cpp").write_text("int hk_nothing;\n")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(build_native, "SOURCE_DIR", sources)
    monkeypatch.setattr(build_native, "levels", lambda: ("no-such-level", "generic"))
    built = build_native.build(tmp_path / "out")
    assert [path.name for path in built] == [build_native.library_name("generic")]


def test_the_installer_can_load_the_build_script_without_the_package():
    # As setup.py does in an isolated environment, where there is no torch.
    script = build_native.__file__
    code = (
        "import runpy, sys; sys.modules['torch'] = None; "
        f"print(runpy.run_path({script!r})['levels']()[-1])"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == build_native.levels()[-1]


def test_everything_public_is_there():
    for name in hetero_kernels.__all__:
        assert hasattr(hetero_kernels, name), name
    assert list(hetero_kernels.__all__) == sorted(hetero_kernels.__all__)
