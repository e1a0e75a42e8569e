"""What every test shares: Hypothesis profiles, markers, poisoned memory, the demo model."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parent.parent

settings.register_profile(
    "ci",
    max_examples=50,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "deep", parent=settings.get_profile("ci"), max_examples=2000, derandomize=False
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def has_cuda() -> bool:
    """Whether a CUDA device is there and not hidden, without importing torch."""
    return os.environ.get("CUDA_VISIBLE_DEVICES") != "" and Path("/dev/nvidiactl").exists()


# SGLang reads it on its first import, in this process and in the servers that tests start.
if not has_cuda():
    os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
    # Triton reads it for each function that it is shown, its own library's included, so it has to
    # be there before anything imports Triton (SGLang does). Servers that tests start do not get it.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip `gpu` tests where there is no device."""
    if has_cuda():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


def pytest_collection_finish() -> None:
    """Take what imports have made out of the garbage collector's sight.

    Looking through all of torch and SGLang stops this process for long, in the middle of what some
    tests bound in time.
    """
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Give it back, so that libraries find what they made when the process ends."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _poisoned_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fill `torch.empty` with NaN (integers: the largest value) in unit and property tests.

    A result that depends on memory nobody wrote then fails, instead of passing by luck.
    """
    torch = sys.modules.get("torch")
    if torch is None or not {"unit", "property"} & set(request.path.relative_to(ROOT).parts):
        yield
        return
    fill = torch.utils.deterministic.fill_uninitialized_memory
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture(scope="session")
def demo_model_dir() -> Path:
    """Transformers directory of SmolLM2-135M-Instruct, made once and kept in `.cache/demo-model`.

    `HETERO_DEMO_MODEL` names another directory that already holds it.
    """
    if given := os.environ.get("HETERO_DEMO_MODEL"):
        return Path(given)
    target = ROOT / ".cache" / "demo-model"
    command = shutil.which("hetero-sglang", path=str(Path(sys.executable).parent))
    if command is None:
        pytest.fail("the command hetero-sglang is not installed; run `make install`")
    # Returns at once when the directory is complete.
    done = subprocess.run(
        [command, "demo-model", "--out", str(target)], capture_output=True, text=True, timeout=300
    )
    if done.returncode != 0:
        pytest.fail(f"hetero-sglang demo-model failed:\n{done.stderr[-2000:]}")
    return target
