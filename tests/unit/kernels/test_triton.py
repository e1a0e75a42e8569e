"""Choosing Triton, doing without it, and what its compiler makes of the kernels (no GPU needed)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from hetero_kernels import dispatch, top_positions, triton_support

CPU = torch.device("cpu")
CUDA = torch.device("cuda")
COMPILE = Path(__file__).parents[2] / "compile_triton.py"


def test_cuda_tensors_choose_triton_and_cpu_tensors_do_not():
    with mock.patch.object(triton_support, "is_installed", return_value=True):
        assert dispatch.resolve("auto", CUDA) == "triton"
        assert dispatch.resolve("auto", CPU) in ("native", "torch")
        assert dispatch.resolve("triton", CUDA) == "triton"
        assert dispatch.resolve("torch", CUDA) == "torch"


def test_without_triton_cuda_tensors_take_torch_and_asking_for_it_is_refused():
    with mock.patch.object(triton_support, "is_installed", return_value=False):
        assert dispatch.resolve("auto", CUDA) == "torch"
        for device in (CUDA, CPU):
            with pytest.raises(ValueError, match=r"not installed: pip install triton"):
                dispatch.resolve("triton", device)


def test_cpu_tensors_without_the_interpreter_are_refused_by_naming_it():
    with (
        mock.patch.object(triton_support, "is_installed", return_value=True),
        mock.patch.object(triton_support, "is_interpreted", return_value=False),
        pytest.raises(ValueError, match="TRITON_INTERPRET=1"),
    ):
        top_positions(torch.zeros(1, 4), 2, impl="triton")


def test_tensors_of_a_device_that_is_not_the_current_one_are_refused():
    with (
        mock.patch.object(triton_support, "is_installed", return_value=True),
        mock.patch.object(torch.cuda, "current_device", return_value=0),
    ):
        assert dispatch.resolve("triton", torch.device("cuda:0")) == "triton"
        for impl in ("auto", "triton"):
            with pytest.raises(ValueError, match=r"current device, cuda:0, got .* cuda:1"):
                dispatch.resolve(impl, torch.device("cuda:1"))


def test_other_devices_are_refused():
    with (
        mock.patch.object(triton_support, "is_installed", return_value=True),
        pytest.raises(ValueError, match="runs on CUDA tensors, got meta"),
    ):
        dispatch.resolve("triton", torch.device("meta"))


def test_an_unknown_implementation_is_refused_with_the_names():
    with pytest.raises(ValueError, match="auto, native, triton, torch or reference, got 'fast'"):
        dispatch.resolve("fast", CPU)


def test_the_package_imports_and_computes_where_triton_cannot_be_imported():
    script = (
        "import sys; sys.modules['triton'] = None\n"
        "import hetero_kernels, torch\n"
        "assert hetero_kernels.top_positions(torch.tensor([1.0, 3.0]), 1).item() == 1\n"
        "assert not [name for name in sys.modules if name.startswith('hetero_kernels.triton_s')"
        " and name != 'hetero_kernels.triton_support']\n"
    )
    path = [str(Path(dispatch.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path)},
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not triton_support.is_installed(), reason="Triton is not installed")
def test_kernels_of_an_h100_compile_and_fit_its_registers_and_shared_memory(tmp_path):
    # What the interpreter cannot show: types of branches, loads that are not vectors, spilling.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = [str(Path(dispatch.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(path)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(COMPILE)],
        capture_output=True,
        text=True,
        timeout=840,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert {kernel["name"] for kernel in kernels} >= {
        *("_append", "_schedule", "_attend", "_merge", "_extend", "_move", "_install"),
        *("_measure", "_combine", "_pool_maxima", "_pool_mean", "_count", "_choose"),
        *("_mark", "_plan", "_quantize"),
    }
    for kernel in kernels:
        assert kernel["shared_bytes"] <= 227 * 1024, kernel
        assert kernel["spilled_bytes"] == 0, kernel
    for kernel in kernels:
        if kernel["phase"] == "model" and kernel["name"] in (
            "_attend",
            "_measure",
            "_pool_maxima",
            "_pool_mean",
            "_extend",
        ):
            assert kernel["num_async_copies"] > 0, f"nothing is loaded ahead: {kernel}"
            assert kernel["num_tensor_products"] > 0, kernel
    # A server whose prompts, chunks and batches have other lengths shall not compile again.
    variants: dict[str, dict[str, list[tuple[str, str]]]] = {}
    for kernel in kernels:
        calls, _, length = kernel["phase"].partition("/")
        if length:
            compiled = variants.setdefault(calls, {}).setdefault(length, [])
            compiled.append((kernel["name"], kernel["hash"]))
    assert set(variants) == {"chunks", "rows", "prompts", "batches"}
    for calls, by_length in variants.items():
        assert len(by_length) > 2, calls
        first, *others = by_length.items()
        for length, compiled in others:
            anew = [name for name, made in compiled if (name, made) not in first[1]]
            assert anew == [], f"{calls}: {length} after {first[0]}"
