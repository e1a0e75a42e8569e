"""HeteroCache for SGLang: part of the KV cache on the device, the rest in a process of its own.

The package is entered through SGLang's plugin mechanism (`hetero_sglang.plugin`) or through the
command line (`hetero_sglang.cli`). Importing it is cheap on purpose: SGLang imports every installed
plugin in every one of its processes, so nothing here may pull in torch or SGLang.
"""

from __future__ import annotations

__all__ = ["__version__"]

__version__ = "0.1.0"
