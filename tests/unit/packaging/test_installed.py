from __future__ import annotations

import importlib
import pkgutil
import re
from importlib.metadata import distribution, entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PACKAGES = ("hetero_sglang", "memd", "hetero_kernels")


def modules_of(package: str) -> list[str]:
    path = importlib.import_module(package).__path__
    found = [module.name for module in pkgutil.walk_packages(path, prefix=f"{package}.")]
    # A main module is run, not imported; the adapter has tests of its own, which import SGLang.
    return [
        package,
        *(name for name in found if not re.search(r"\.(__main__|sglang_adapter\b.*)$", name)),
    ]


@pytest.mark.parametrize("name", ["hetero-sglang", "memd"])
def test_console_script_leads_to_a_function(name: str) -> None:
    (script,) = (s for s in distribution("hetero-sglang").entry_points if s.name == name)
    assert script.group == "console_scripts"
    assert callable(script.load())


def test_sglang_finds_the_plugin_by_its_entry_point() -> None:
    (found,) = entry_points(group="sglang.srt.plugins", name="heterocache")
    assert found.value == "hetero_sglang.plugin:register"
    assert callable(found.load())


@pytest.mark.parametrize("package", PACKAGES)
def test_everything_in_all_exists(package: str) -> None:
    missing = [
        f"{name}.{public}"
        for name in modules_of(package)
        for public in getattr(importlib.import_module(name), "__all__", ())
        if not hasattr(importlib.import_module(name), public)
    ]
    assert not missing


def test_every_requirement_is_pinned() -> None:
    for path in sorted((ROOT / "requirements").glob("*.txt")):
        for line in path.read_text().splitlines():
            requirement = line.partition("#")[0].partition(";")[0].strip()
            assert not requirement or re.fullmatch(r"[\w.-]+==[\w.]+", requirement), (path, line)


def test_a_package_has_one_version_in_all_requirements() -> None:
    versions: dict[str, set[str]] = {}
    for path in (ROOT / "requirements").glob("*.txt"):
        for name, version in re.findall(r"^([\w.-]+)==([\w.]+)", path.read_text(), re.MULTILINE):
            versions.setdefault(name.lower(), set()).add(version)
    assert {name: found for name, found in versions.items() if len(found) > 1} == {}


def test_documents_name_only_make_targets_that_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    texts = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    used = {name for text in texts for name in re.findall(r"`make ([a-z-]+)", text.read_text())}
    assert used
    assert used <= targets


def test_documents_link_only_to_files_that_exist() -> None:
    broken = [
        f"{text.relative_to(ROOT)} -> {target}"
        for text in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))
        for target in re.findall(r"\]\(([^)#:]+)[^):]*\)", text.read_text())
        if not (text.parent / target).exists()
    ]
    assert not broken
