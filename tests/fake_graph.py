"""What a CUDA graph does, on a CPU: launches are recorded once and replayed without their Python.

``FakeGraph.capture`` notes every torch operation and every (interpreted) Triton launch of a call,
with the tensors that it had. ``replay`` runs these again, on the same tensors: what the call's
Python decided is frozen, what lies at the addresses is not. While it is recorded a call is guarded
by ``NoHostSync``.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# Each makes the host wait for the device, or gives a tensor whose shape depends on contents.
_WAITING = {
    "aten::_local_scalar_dense",
    "aten::item",
    "aten::equal",
    "aten::is_nonzero",
    "aten::nonzero",
    "aten::masked_select",
    "aten::unique_consecutive",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::bincount",
    "aten::repeat_interleave.Tensor",
}
# These move contents between host and device, or make tensors of what the host knows.
_MOVING = {"aten::lift_fresh", "aten::pin_memory", "aten::_pin_memory", "aten::set_.source_Tensor"}
_MAKING = {"aten::empty.memory_format", "aten::empty_strided", "aten::empty_like"}


class HostSyncError(AssertionError):
    """A call did what a CUDA graph cannot hold."""


class NoHostSync(TorchDispatchMode):
    """Raises where torch would wait for the device, or make tensors out of host data.

    Where everything is on the CPU nothing waits, so this goes by what an operation would do if its
    tensors were on a device: reading a value (``item``, ``tolist``, truth), shapes that depend on
    contents (``nonzero``, boolean indices), conversions to another device and tensors made from
    Python data. ``numpy`` and ``tolist`` of a CPU tensor never come by here; ``guarded`` replaces
    them.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = str(func.name())
        base = name.split(".")[0]
        if name in _WAITING or base in _WAITING:
            raise HostSyncError(f"{name} waits for the device")
        if name in _MOVING or base in _MOVING:
            raise HostSyncError(f"{name} takes data from the host")
        if base in ("aten::index", "aten::index_put_", "aten::index_put"):
            indices = [t for t in tree_leaves(args[1]) if isinstance(t, torch.Tensor)]
            if any(t.dtype in (torch.bool, torch.uint8) for t in indices):
                raise HostSyncError(f"{name} with a boolean index waits for the device")
        if base in ("aten::_to_copy", "aten::to") and kwargs.get("device") is not None:
            source = next(t for t in tree_leaves(args) if isinstance(t, torch.Tensor))
            # On the CPU a copy that names a device is one that would cross over.
            raise HostSyncError(f"{name} from {source.device} names the device {kwargs['device']}")
        if base in ("aten::copy_", "aten::_to_copy"):
            devices = {t.device.type for t in tree_leaves(args) if isinstance(t, torch.Tensor)}
            if len(devices) > 1:
                raise HostSyncError(f"{name} between {' and '.join(sorted(devices))}")
        return self.observe(func, args, kwargs)

    def observe(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Runs an operation that is allowed."""
        return func(*args, **kwargs)

    def launch(self, kernel: Any, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Runs a Triton launch; the interpreter's own torch calls are nobody's business."""
        with _disable_current_modes():
            return run(kernel, *args, **kwargs)


@contextlib.contextmanager
def guarded(guard: NoHostSync) -> Iterator[NoHostSync]:
    """Runs a block under a guard, Triton's launches and ``numpy`` included."""
    from triton.runtime.interpreter import InterpretedFunction

    run = InterpretedFunction.run
    is_inside = False

    def launch(kernel: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal is_inside
        is_inside, before = True, is_inside
        try:
            return guard.launch(kernel, run, args, kwargs)
        finally:
            is_inside = before

    def refusing(name: str) -> Any:
        original = getattr(torch.Tensor, name)

        def refuse(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if is_inside:
                return original(tensor, *args, **kwargs)
            raise HostSyncError(f"{name}() reads a tensor on the host")

        return mock.patch.object(torch.Tensor, name, refuse)

    with (
        mock.patch.object(InterpretedFunction, "run", launch),
        refusing("numpy"),
        refusing("tolist"),
        guard,
    ):
        yield guard


class FakeGraph(NoHostSync):
    """A recorded call.

    Attributes:
        num_launches: Triton launches that were recorded.
        made: Tensors that the call made and the graph owns (its private pool).
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_launches = 0
        self.made: list[torch.Tensor] = []
        self._nodes: list[tuple[Any, Any, dict[str, Any], Any]] = []

    @classmethod
    def capture(cls, call: Callable[[], Any]) -> FakeGraph:
        """Records a call; like on a device, what it writes is written by the replays that follow.

        (Here recording runs it as well, so a test that wants to see the difference resets first.)
        """
        graph = cls()
        with guarded(graph):
            call()
        return graph

    def observe(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        out = func(*args, **kwargs)
        self._nodes.append((func, args, kwargs, out))
        known = {t.data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.data_ptr() not in known:
                self.made.append(tensor)
        return out

    def launch(self, kernel: Any, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        self._nodes.append((run, (kernel, *args), kwargs, None))
        self.num_launches += 1
        return super().launch(kernel, run, args, kwargs)

    def replay(self) -> None:
        """Runs what was recorded, on the tensors that it was recorded with."""
        for func, args, kwargs, out in self._nodes:
            again = func(*args, **kwargs)
            if not isinstance(out, torch.Tensor):
                continue
            if func.name() in _MAKING:
                # Memory that nobody has written yet.
                if out.is_floating_point():
                    out.fill_(float("nan"))
            elif again.data_ptr() != out.data_ptr():
                out.copy_(again)
