"""memd's own binding of the CUDA driver and what it needs of it: the one place that speaks CUDA.

Nothing here is loaded, and no context exists, until somebody asks for it; then ``driver`` opens the
driver's library through ctypes, without torch and without the CUDA runtime. Calls leave the
interpreter lock, so one that hangs takes its own thread and no other.

====================  ==============================================================================
``driver``            the driver calls that are used, as a protocol and as a binding
``context``           which device, and its primary context
``registration``      page-locking of a mapping, in chunks; also for an engine that copies itself
``export``            an engine's landing ring on the device as something that memd can open
``ring``              such a ring opened: one stream, copies in order, completion by events
``staging``           who owns which bytes of the page-locked memory that copies read
``worker``            the one thread that calls the driver for one device
``commands``          what the control thread and that one say to each other
``device``            a device as the control thread sees it; never blocks
``fake_machine``      devices for tests, with real memory
``fake``              a driver for tests, which fails and hangs when told to
====================  ==============================================================================

memd itself uses it through ``memd.rings``, an engine through ``memd.client`` and `export_ring`.
Not yet run on a GPU.
"""

from __future__ import annotations

from memd.cuda.driver import Driver, load_driver
from memd.cuda.errors import CudaError, DeviceLost, DriverMissing, RingRefused
from memd.cuda.export import export_ring
from memd.cuda.registration import PageLock
from memd.cuda.ring import RingHandle

__all__ = [
    "CudaError",
    "DeviceLost",
    "Driver",
    "DriverMissing",
    "PageLock",
    "RingHandle",
    "RingRefused",
    "export_ring",
    "load_driver",
]
