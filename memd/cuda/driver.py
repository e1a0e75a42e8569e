"""The CUDA driver calls that are used, as a protocol, and their binding to ``libcuda.so.1``.

Methods carry this project's words; an error names CUDA's. Devices, contexts, streams and events are
the driver's own handles as integers, memory is an address. A call acts on the context that is
current on the thread that makes it.

The driver API and not the runtime: it is the part that every machine with a GPU has, it makes no
context behind one's back, and its symbols are versioned.

Not yet run on a GPU.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_int, c_size_t, c_ubyte, c_uint, c_uint64, c_void_p
from typing import Any, Protocol

from memd.cuda.errors import CudaError, DriverMissing

__all__ = ["IPC_HANDLE_BYTES", "UUID_BYTES", "CudaDriver", "Driver", "load_driver"]

IPC_HANDLE_BYTES = 64
"""Length of the handle of an allocation that another process may map."""

UUID_BYTES = 16
"""Length of a device's UUID."""

_NOT_READY = 600
_STREAM_NON_BLOCKING = 1
_EVENT_DISABLE_TIMING = 2
_IPC_LAZY_ENABLE_PEER_ACCESS = 1
_HOST_REGISTER_PORTABLE_AND_MAPPED = 1 | 2
_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM = 91
_POINTER_IS_LEGACY_IPC_CAPABLE = 10


class _IpcHandle(ctypes.Structure):
    """``CUipcMemHandle``; goes by value."""

    # Not c_char: the first zero byte would end it.
    _fields_ = (("reserved", c_ubyte * IPC_HANDLE_BYTES),)


class _Uuid(ctypes.Structure):
    _fields_ = (("bytes", c_ubyte * UUID_BYTES),)


# Name in CUDA's documentation -> symbol of the version that is meant, types of the arguments.
_ADDRESS = c_uint64
_FUNCTIONS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "cuInit": ("cuInit", (c_uint,)),
    "cuDeviceGetCount": ("cuDeviceGetCount", (POINTER(c_int),)),
    "cuDeviceGet": ("cuDeviceGet", (POINTER(c_int), c_int)),
    "cuDeviceGetUuid": ("cuDeviceGetUuid_v2", (POINTER(_Uuid), c_int)),
    "cuDeviceGetAttribute": ("cuDeviceGetAttribute", (POINTER(c_int), c_int, c_int)),
    "cuDevicePrimaryCtxRetain": ("cuDevicePrimaryCtxRetain", (POINTER(c_void_p), c_int)),
    "cuDevicePrimaryCtxRelease": ("cuDevicePrimaryCtxRelease_v2", (c_int,)),
    "cuCtxSetCurrent": ("cuCtxSetCurrent", (c_void_p,)),
    "cuIpcOpenMemHandle": ("cuIpcOpenMemHandle_v2", (POINTER(_ADDRESS), _IpcHandle, c_uint)),
    "cuIpcCloseMemHandle": ("cuIpcCloseMemHandle", (_ADDRESS,)),
    "cuIpcGetMemHandle": ("cuIpcGetMemHandle", (POINTER(_IpcHandle), _ADDRESS)),
    "cuMemGetAddressRange": (
        "cuMemGetAddressRange_v2",
        (POINTER(_ADDRESS), POINTER(c_size_t), _ADDRESS),
    ),
    "cuPointerGetAttribute": ("cuPointerGetAttribute", (c_void_p, c_int, _ADDRESS)),
    "cuStreamCreate": ("cuStreamCreate", (POINTER(c_void_p), c_uint)),
    "cuStreamDestroy": ("cuStreamDestroy_v2", (c_void_p,)),
    "cuMemcpyHtoDAsync": ("cuMemcpyHtoDAsync_v2", (_ADDRESS, c_void_p, c_size_t, c_void_p)),
    "cuEventCreate": ("cuEventCreate", (POINTER(c_void_p), c_uint)),
    "cuEventRecord": ("cuEventRecord", (c_void_p, c_void_p)),
    "cuEventQuery": ("cuEventQuery", (c_void_p,)),
    "cuEventDestroy": ("cuEventDestroy_v2", (c_void_p,)),
    "cuMemHostRegister": ("cuMemHostRegister_v2", (c_void_p, c_size_t, c_uint)),
    "cuMemHostUnregister": ("cuMemHostUnregister", (c_void_p,)),
    "cuMemHostGetDevicePointer": (
        "cuMemHostGetDevicePointer_v2",
        (POINTER(_ADDRESS), c_void_p, c_uint),
    ),
    "cuGetErrorName": ("cuGetErrorName", (c_int, POINTER(ctypes.c_char_p))),
}


class Driver(Protocol):
    """One process's CUDA driver. Every method may raise ``CudaError``."""

    def init(self) -> None:
        """Start the driver; needed once before everything else, harmless when repeated."""

    def device_count(self) -> int:
        """Devices that this process may see."""

    def device(self, ordinal: int) -> int:
        """The device with a number from 0 on."""

    def device_uuid(self, device: int) -> bytes:
        """The device's UUID, or of its MIG instance; 16 bytes, the same in every process."""

    def can_use_host_pointers(self, device: int) -> bool:
        """Whether the device may address registered host memory as the processor does."""

    def retain_context(self, device: int) -> int:
        """The device's primary context, which exists at least until ``release_context``."""

    def release_context(self, device: int) -> None:
        """Take back one ``retain_context``; the last one ends all that the context holds."""

    def set_current(self, context: int | None) -> None:
        """Make a context this thread's, or none."""

    def open_ipc(self, handle: bytes) -> int:
        """Map another process's allocation; its first address here, however often it is opened."""

    def close_ipc(self, address: int) -> None:
        """Take back one ``open_ipc``; the last one unmaps."""

    def ipc_handle(self, address: int) -> bytes:
        """Handle of this process's allocation that begins at ``address``, for ``open_ipc``."""

    def is_ipc_capable(self, address: int) -> bool:
        """Whether the allocation around an address can have such a handle."""

    def allocation_of(self, address: int) -> tuple[int, int]:
        """First address and bytes of the allocation around an address."""

    def create_stream(self) -> int:
        """A stream that waits for no other."""

    def destroy_stream(self, stream: int) -> None:
        """Let go of a stream."""

    def copy_to_device(self, target: int, source: int, num_bytes: int, stream: int) -> None:
        """Begin a copy from host memory; it reads its source at any time until it is done."""

    def create_event(self) -> int:
        """An event without times."""

    def record_event(self, event: int, stream: int) -> None:
        """Set the event to be done once all work so far in the stream is."""

    def is_done(self, event: int) -> bool:
        """Whether what the event was recorded after is done; False right away if not."""

    def destroy_event(self, event: int) -> None:
        """Let go of an event."""

    def register_host(self, address: int, num_bytes: int) -> None:
        """Page-lock host memory for all contexts, and map it to their devices."""

    def unregister_host(self, address: int) -> None:
        """Undo the ``register_host`` of this address."""

    def device_pointer(self, address: int) -> int:
        """Where the device sees registered memory that begins at ``address``."""


def load_driver(library: str = "libcuda.so.1") -> Driver:
    """Open the driver's library; makes no CUDA call.

    Args:
        library: Its file, as the dynamic loader takes it.

    Raises:
        DriverMissing: It is not there, or an old one.
    """
    try:
        # CDLL, not PyDLL: a call must leave the interpreter lock.
        return CudaDriver(ctypes.CDLL(library))
    except OSError as error:
        raise DriverMissing(
            f"{library} cannot be loaded ({error}): copies to a GPU need NVIDIA's driver; in a "
            f"container, pass the GPU through (docker: --gpus), else use another data path"
        ) from error


class CudaDriver:
    """``Driver`` over the real library; made by ``load_driver``.

    Args:
        library: The opened library.

    Raises:
        DriverMissing: It lacks a function.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._functions = {}
        for name, (symbol, argument_types) in _FUNCTIONS.items():
            try:
                function = library[symbol]
            except AttributeError as error:
                raise DriverMissing(
                    f"the CUDA driver has no {symbol}: it is older than version 470 (CUDA 11.4); "
                    f"update it"
                ) from error
            function.argtypes = argument_types
            function.restype = c_int
            self._functions[name] = function

    def init(self) -> None:
        """See ``Driver``."""
        self._call("cuInit", 0)

    def device_count(self) -> int:
        """See ``Driver``."""
        count = c_int()
        self._call("cuDeviceGetCount", byref(count))
        return count.value

    def device(self, ordinal: int) -> int:
        """See ``Driver``."""
        device = c_int()
        self._call("cuDeviceGet", byref(device), ordinal)
        return device.value

    def device_uuid(self, device: int) -> bytes:
        """See ``Driver``."""
        uuid = _Uuid()
        self._call("cuDeviceGetUuid", byref(uuid), device)
        return bytes(uuid)

    def can_use_host_pointers(self, device: int) -> bool:
        """See ``Driver``."""
        value = c_int()
        attribute = _CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM
        self._call("cuDeviceGetAttribute", byref(value), attribute, device)
        return value.value != 0

    def retain_context(self, device: int) -> int:
        """See ``Driver``."""
        return self._create("cuDevicePrimaryCtxRetain", device)

    def release_context(self, device: int) -> None:
        """See ``Driver``."""
        self._call("cuDevicePrimaryCtxRelease", device)

    def set_current(self, context: int | None) -> None:
        """See ``Driver``."""
        self._call("cuCtxSetCurrent", context)

    def open_ipc(self, handle: bytes) -> int:
        """See ``Driver``."""
        address = _ADDRESS()
        by_value = _IpcHandle.from_buffer_copy(handle)
        self._call("cuIpcOpenMemHandle", byref(address), by_value, _IPC_LAZY_ENABLE_PEER_ACCESS)
        return address.value

    def close_ipc(self, address: int) -> None:
        """See ``Driver``."""
        self._call("cuIpcCloseMemHandle", address)

    def ipc_handle(self, address: int) -> bytes:
        """See ``Driver``."""
        handle = _IpcHandle()
        self._call("cuIpcGetMemHandle", byref(handle), address)
        return bytes(handle)

    def is_ipc_capable(self, address: int) -> bool:
        """See ``Driver``."""
        # CUDA calls it a boolean; room for an int is right for either width.
        value = c_int(0)
        self._call("cuPointerGetAttribute", byref(value), _POINTER_IS_LEGACY_IPC_CAPABLE, address)
        return value.value != 0

    def allocation_of(self, address: int) -> tuple[int, int]:
        """See ``Driver``."""
        base, num_bytes = _ADDRESS(), c_size_t()
        self._call("cuMemGetAddressRange", byref(base), byref(num_bytes), address)
        return base.value, num_bytes.value

    def create_stream(self) -> int:
        """See ``Driver``."""
        return self._create("cuStreamCreate", _STREAM_NON_BLOCKING)

    def destroy_stream(self, stream: int) -> None:
        """See ``Driver``."""
        self._call("cuStreamDestroy", stream)

    def copy_to_device(self, target: int, source: int, num_bytes: int, stream: int) -> None:
        """See ``Driver``."""
        self._call("cuMemcpyHtoDAsync", target, source, num_bytes, stream)

    def create_event(self) -> int:
        """See ``Driver``."""
        return self._create("cuEventCreate", _EVENT_DISABLE_TIMING)

    def record_event(self, event: int, stream: int) -> None:
        """See ``Driver``."""
        self._call("cuEventRecord", event, stream)

    def is_done(self, event: int) -> bool:
        """See ``Driver``."""
        code = self._functions["cuEventQuery"](event)
        if code == _NOT_READY:
            return False
        self._check("cuEventQuery", code)
        return True

    def destroy_event(self, event: int) -> None:
        """See ``Driver``."""
        self._call("cuEventDestroy", event)

    def register_host(self, address: int, num_bytes: int) -> None:
        """See ``Driver``."""
        self._call("cuMemHostRegister", address, num_bytes, _HOST_REGISTER_PORTABLE_AND_MAPPED)

    def unregister_host(self, address: int) -> None:
        """See ``Driver``."""
        self._call("cuMemHostUnregister", address)

    def device_pointer(self, address: int) -> int:
        """See ``Driver``."""
        pointer = _ADDRESS()
        self._call("cuMemHostGetDevicePointer", byref(pointer), address, 0)
        return pointer.value

    def _create(self, call: str, argument: int) -> int:
        handle = c_void_p()
        self._call(call, byref(handle), argument)
        return handle.value or 0

    def _call(self, call: str, *arguments: Any) -> None:
        self._check(call, self._functions[call](*arguments))

    def _check(self, call: str, code: int) -> None:
        if code == 0:
            return
        name = ctypes.c_char_p()
        is_known = self._functions["cuGetErrorName"](code, byref(name)) == 0 and name.value
        raise CudaError(call, name.value.decode() if is_known and name.value else f"error {code}")
