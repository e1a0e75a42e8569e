"""The binding against a library with CUDA's symbols: what arrives there, what comes back."""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from memd.cuda.driver import Driver, load_driver
from memd.cuda.errors import CudaError, DriverMissing

COMPILER = shutil.which("cc")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C compiler")

STUB = r"""
#include <string.h>
#ifdef CUDA_HEADER
#include CUDA_HEADER
#else
#include <stddef.h>
typedef int CUresult; typedef int CUdevice; typedef int CUdevice_attribute;
typedef int CUpointer_attribute; typedef unsigned long long CUdeviceptr;
typedef struct context *CUcontext; typedef struct stream *CUstream; typedef struct event *CUevent;
typedef struct { char bytes[16]; } CUuuid;
typedef struct { char reserved[64]; } CUipcMemHandle;
#define cuDeviceGetUuid cuDeviceGetUuid_v2
#define cuDevicePrimaryCtxRelease cuDevicePrimaryCtxRelease_v2
#define cuIpcOpenMemHandle cuIpcOpenMemHandle_v2
#define cuMemGetAddressRange cuMemGetAddressRange_v2
#define cuStreamDestroy cuStreamDestroy_v2
#define cuMemcpyHtoDAsync cuMemcpyHtoDAsync_v2
#define cuEventDestroy cuEventDestroy_v2
#define cuMemHostRegister cuMemHostRegister_v2
#define cuMemHostGetDevicePointer cuMemHostGetDevicePointer_v2
#endif
#define EXPECT(holds) do { if (!(holds)) return 1; } while (0)

CUresult cuInit(unsigned int flags) { EXPECT(flags == 0); return 0; }
CUresult cuDeviceGetCount(int *count) { *count = 2; return 0; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) {
  if (ordinal > 1) return 101;
  *device = ordinal + 10; return 0;
}
CUresult cuDeviceGetUuid(CUuuid *uuid, CUdevice device) {
  EXPECT(device == 11);
  for (int i = 0; i < 16; i++) uuid->bytes[i] = (char)(i * 17);
  return 0;
}
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  EXPECT(attribute == 91); *value = device == 11; return 0;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
  *context = (CUcontext)(size_t)(0x7fff00000000 + device); return 0;
}
CUresult cuDevicePrimaryCtxRelease(CUdevice device) { EXPECT(device == 11); return 0; }
CUresult cuCtxSetCurrent(CUcontext context) {
  EXPECT(context == 0 || context == (CUcontext)(size_t)(0x7fff00000000 + 11)); return 0;
}
CUresult cuIpcOpenMemHandle(CUdeviceptr *address, CUipcMemHandle handle, unsigned int flags) {
  EXPECT(flags == 1);
  for (int i = 0; i < 64; i++) EXPECT((unsigned char)handle.reserved[i] == (i * 5) % 256);
  *address = 0x7f0123456700; return 0;
}
CUresult cuIpcCloseMemHandle(CUdeviceptr address) { EXPECT(address == 0x7f0123456700); return 0; }
CUresult cuIpcGetMemHandle(CUipcMemHandle *handle, CUdeviceptr address) {
  EXPECT(address == 0x7f0123456700);
  for (int i = 0; i < 64; i++) handle->reserved[i] = (char)(i * 5);
  return 0;
}
CUresult cuMemGetAddressRange(CUdeviceptr *base, size_t *size, CUdeviceptr address) {
  *base = address - 256; *size = (size_t)1 << 33; return 0;
}
CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr address) {
  EXPECT(attribute == 10); *(char *)value = address == 0x7f0123456700; return 0;
}
CUresult cuStreamCreate(CUstream *stream, unsigned int flags) {
  EXPECT(flags == 1); *stream = (CUstream)(size_t)0x7fffaaaa0001; return 0;
}
CUresult cuStreamDestroy(CUstream stream) {
  EXPECT(stream == (CUstream)(size_t)0x7fffaaaa0001); return 0;
}
CUresult cuMemcpyHtoDAsync(CUdeviceptr target, const void *source, size_t size, CUstream stream) {
  EXPECT(stream == (CUstream)(size_t)0x7fffaaaa0001);
  memcpy((void *)(size_t)target, source, size); return 0;
}
CUresult cuEventCreate(CUevent *event, unsigned int flags) {
  EXPECT(flags == 2); *event = (CUevent)(size_t)0x7fffbbbb0001; return 0;
}
CUresult cuEventRecord(CUevent event, CUstream stream) {
  EXPECT(event == (CUevent)(size_t)0x7fffbbbb0001);
  EXPECT(stream == (CUstream)(size_t)0x7fffaaaa0001); return 0;
}
CUresult cuEventQuery(CUevent event) {
  static int asked;
  return event == (CUevent)(size_t)0x7fffbbbb0001 ? (asked++ ? 0 : 600) : 700;
}
CUresult cuEventDestroy(CUevent event) {
  EXPECT(event == (CUevent)(size_t)0x7fffbbbb0001); return 0;
}
CUresult cuMemHostRegister(void *address, size_t size, unsigned int flags) {
  EXPECT(address == (void *)0x7f1000000000 && size == (size_t)1 << 33 && flags == 3); return 0;
}
CUresult cuMemHostUnregister(void *address) { return address ? 0 : 12345; }
CUresult cuMemHostGetDevicePointer(CUdeviceptr *pointer, void *address, unsigned int flags) {
  EXPECT(flags == 0); *pointer = (CUdeviceptr)(size_t)address + 4096; return 0;
}
CUresult cuGetErrorName(CUresult code, const char **name) {
  if (code == 101) { *name = "CUDA_ERROR_INVALID_DEVICE"; return 0; }
  if (code == 700) { *name = "CUDA_ERROR_ILLEGAL_ADDRESS"; return 0; }
  *name = 0; return 1;
}
"""


def compile_stub(folder: Path, source: str = STUB, *flags: str) -> Path:
    assert COMPILER is not None
    library = folder / "libcuda.so.1"
    (folder / "stub.c").write_text(source)
    subprocess.run(
        [COMPILER, "-shared", "-fPIC", "-Werror", *flags, "-o", library, folder / "stub.c"],
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return library


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Driver:
    return load_driver(str(compile_stub(tmp_path_factory.mktemp("stub"))))


def test_what_the_stub_declares_is_what_cudas_own_header_declares(tmp_path: Path) -> None:
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        pytest.skip("no CUDA header: triton is not installed")
    header = Path(triton.origin).parent / "backends" / "nvidia" / "include" / "cuda.h"
    if not header.exists():
        pytest.skip("no CUDA header: this triton has none")
    # Another prototype under the same name would not compile; another version of a function would
    # have another symbol, and not be found.
    library = compile_stub(tmp_path, STUB, f'-DCUDA_HEADER="{header}"')
    load_driver(str(library))


def test_devices_are_found_by_uuid_and_attribute(driver: Driver) -> None:
    driver.init()
    assert driver.device_count() == 2
    assert driver.device(1) == 11
    assert driver.device_uuid(11) == bytes(i * 17 for i in range(16))
    assert driver.can_use_host_pointers(11)
    assert not driver.can_use_host_pointers(10)


def test_a_context_is_retained_made_current_and_released(driver: Driver) -> None:
    context = driver.retain_context(11)
    assert context == 0x7FFF00000000 + 11
    driver.set_current(context)
    driver.set_current(None)
    driver.release_context(11)


def test_an_ipc_handle_keeps_its_zero_bytes_in_both_directions(driver: Driver) -> None:
    handle = bytes((i * 5) % 256 for i in range(64))
    address = driver.open_ipc(handle)
    assert address == 0x7F0123456700
    assert driver.ipc_handle(address) == handle
    driver.close_ipc(address)


def test_an_allocation_is_known_by_any_address_in_it(driver: Driver) -> None:
    assert driver.allocation_of(0x7F0123456700) == (0x7F0123456600, 1 << 33)
    assert driver.is_ipc_capable(0x7F0123456700)
    assert not driver.is_ipc_capable(0x7F0123456800)


def test_a_copy_is_asked_for_and_its_event_queried(driver: Driver) -> None:
    source, target = np.arange(32, dtype=np.uint8), np.zeros(32, dtype=np.uint8)
    stream, event = driver.create_stream(), driver.create_event()
    driver.copy_to_device(target.ctypes.data, source.ctypes.data, 20, stream)
    driver.record_event(event, stream)

    assert target.tolist() == [*range(20), *[0] * 12]
    assert [driver.is_done(event), driver.is_done(event)] == [False, True]
    driver.destroy_event(event)
    driver.destroy_stream(stream)


def test_host_memory_is_registered_portable_and_mapped(driver: Driver) -> None:
    driver.register_host(0x7F1000000000, 1 << 33)
    assert driver.device_pointer(0x7F1000000000) == 0x7F1000001000
    driver.unregister_host(0x7F1000000000)


def test_an_error_names_the_call_and_cudas_name(driver: Driver) -> None:
    with pytest.raises(CudaError, match=r"^cuDeviceGet: CUDA_ERROR_INVALID_DEVICE$") as raised:
        driver.device(7)
    assert (raised.value.call, raised.value.name) == ("cuDeviceGet", "CUDA_ERROR_INVALID_DEVICE")
    with pytest.raises(CudaError, match="cuEventQuery: CUDA_ERROR_ILLEGAL_ADDRESS"):
        driver.is_done(3)


def test_an_error_that_cuda_has_no_name_for_shows_its_number(driver: Driver) -> None:
    with pytest.raises(CudaError, match="cuMemHostUnregister: error 12345"):
        driver.unregister_host(0)


def test_a_machine_without_the_driver_is_told_what_would_help() -> None:
    with pytest.raises(DriverMissing, match=r"libno-cuda\.so.*--gpus.*another data path"):
        load_driver("libno-cuda.so")


def test_an_old_driver_is_named_by_what_it_lacks(tmp_path: Path) -> None:
    old = compile_stub(tmp_path, STUB.replace("cuDeviceGetUuid", "cuDeviceGetOther"))
    with pytest.raises(DriverMissing, match=r"has no cuDeviceGetUuid_v2.*470.*update"):
        load_driver(str(old))


def test_a_call_that_hangs_leaves_the_interpreter_to_others(tmp_path: Path) -> None:
    # Twenty seconds, unless somebody else gets to say that it may go.
    declared = "unsigned int usleep(unsigned int);\nstatic volatile int released;\n"
    declared += "void let_go(void) { released = 1; }\n"
    waiting = "{ for (int i = 0; i < 20000 && !released; i++) usleep(1000); return !released; }"
    stub = STUB.replace("{ EXPECT(flags == 0); return 0; }", waiting)
    assert stub != STUB
    library = compile_stub(tmp_path, declared + stub)
    driver = load_driver(str(library))
    errors: list[CudaError] = []

    def call() -> None:
        try:
            driver.init()
        except CudaError as error:
            errors.append(error)

    caller = threading.Thread(target=call)
    caller.start()
    time.sleep(0.05)
    ctypes.CDLL(str(library)).let_go()
    caller.join(60.0)
    assert not caller.is_alive()
    assert errors == []


def test_importing_memds_cuda_package_loads_no_driver_and_no_torch() -> None:
    code = (
        "import memd.transfer.cuda_ipc, memd.cuda, sys; maps = open('/proc/self/maps').read();"
        "sys.exit('libcuda' in maps or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
