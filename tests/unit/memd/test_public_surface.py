from __future__ import annotations

import importlib
import inspect
import pkgutil

import pytest

import memd
from memd import errors

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(memd.__path__, "memd.")
    if not module.name.endswith("__main__")
)


@pytest.mark.parametrize("name", ["memd", *MODULES])
def test_every_module_exports_exactly_its_public_names(name: str) -> None:
    module = importlib.import_module(name)
    assert len(set(module.__all__)) == len(module.__all__)
    for public in module.__all__:
        assert hasattr(module, public)
    own = {
        key
        for key, value in vars(module).items()
        if not key.startswith("_")
        and (inspect.isclass(value) or inspect.isfunction(value))
        and value.__module__ == name
    }
    assert own <= set(module.__all__)


def test_every_error_is_one_tree() -> None:
    for name in errors.__all__:
        assert issubclass(getattr(errors, name), errors.MemdError)
