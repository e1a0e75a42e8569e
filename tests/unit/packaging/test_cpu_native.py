from __future__ import annotations

import importlib.util
import subprocess
import sys
from importlib.metadata import entry_points

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("sglang_cpu_native") is None,
    reason="the CPU platform is not installed (a CUDA installation does without)",
)


def run(code: str) -> str:
    """Output of a fresh interpreter: the stand-ins change what later imports find."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=170, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def test_sglang_finds_the_platform_by_its_entry_point() -> None:
    (found,) = entry_points(group="sglang.srt.platforms", name="cpu_native")
    assert found.value == "sglang_cpu_native:activate"
    assert found.dist is not None
    assert found.dist.name == "sglang-cpu-native"


def test_absent_kernels_can_be_imported_and_fail_by_name_when_called() -> None:
    output = run(
        "import torch; torch.cuda.is_available = lambda: False\n"
        "import importlib.util as u, sglang_cpu_native as native\n"
        "u.find_spec = lambda name, package=None: None\n"
        "print(native.activate())\n"
        "from sgl_kernel import tree_speculative_sampling_target_only as kernel\n"
        "try: kernel(1, flag=True)\n"
        "except NotImplementedError as error: print(error)\n"
        "import sgl_kernel; print(hasattr(sgl_kernel, '__path__'))"
    )
    returned, message, is_package = output.splitlines()
    assert returned == "None"
    assert message.startswith("sgl_kernel.tree_speculative_sampling_target_only is not available")
    assert is_package == "False"


@pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is not None, reason="torchvision is installed"
)
def test_transformers_still_sees_torchvision_as_absent() -> None:
    output = run(
        "import torch; torch.cuda.is_available = lambda: False\n"
        "import sglang_cpu_native; sglang_cpu_native.activate()\n"
        "from torchvision.transforms import InterpolationMode\n"
        "from transformers.utils.import_utils import is_torchvision_available\n"
        "print(InterpolationMode('bicubic').name, is_torchvision_available())"
    )
    assert output == "BICUBIC False"


def test_nothing_changes_where_a_gpu_is() -> None:
    output = run(
        "import sys, torch; torch.cuda.is_available = lambda: True\n"
        "import sglang_cpu_native; sglang_cpu_native.activate()\n"
        "print('sgl_kernel' in sys.modules, 'torchvision' in sys.modules)"
    )
    assert output == "False False"


def test_real_packages_are_left_alone() -> None:
    output = run(
        "import sys, torch; torch.cuda.is_available = lambda: False\n"
        "import importlib.util as u, sglang_cpu_native\n"
        "u.find_spec = lambda name, package=None: object()\n"
        "sglang_cpu_native.activate()\n"
        "print('sgl_kernel' in sys.modules, 'torchvision' in sys.modules)"
    )
    assert output == "False False"
