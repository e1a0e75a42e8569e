"""Pages on disk: slots of one file, each with a checksum and the identity of what it holds.

The verbs of a slot::

    put(identity, data) ──> Slot ──> get(slot, identity, into), any number of times ──> free(slot)

``get`` gives the bytes that were put, or says that it cannot: a slot that holds another page, a
disk that lost a write, put it elsewhere or returns other bits is a False and never wrong bytes. A
slot that was found bad is set aside with its blocks, and no page goes there again.

Either verb is three steps, so that another thread may wait for the disk: ``begin_put`` and
``begin_get`` do the books and give a job, its ``run`` does checksum, reading and writing and
touches no book, and ``end_put`` and ``end_get`` do the rest of the books.

On disk a slot is a block for its header and then the page, padded to whole blocks. What the header
says is kept in memory too, and all three have to agree.

Nothing here raises once the file is there: a full disk is None, an error is None or False, and
counted. After some errors in a row no more is written, or read, for good, and the log has one line
that says so. A disk that fails slowly must not do it once for every page.

This module must not know clients, the region or who decides what goes here. One thread calls
everything but ``run``, and one, that or another, calls ``run`` of one job at a time.
"""

from __future__ import annotations

import dataclasses
import logging
import mmap
import time
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from memd.allocator import RangeAllocator
from memd.errors import IntegrityError
from memd.tiers.files import BLOCK_BYTES, AnonymousFile, read_whole, write_whole
from memd.tiers.header import HEADER_BYTES, SlotHeader, checksum, read_header

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from memd.tiers.files import TierFile
    from memd.tiers.header import PageIdentity

__all__ = ["DiskCounters", "DiskTier", "GetJob", "PutJob", "Slot"]

_LOG = logging.getLogger(__name__)

_MAX_ERRORS_IN_A_ROW = 3


class Slot(NamedTuple):
    """A page's place on disk.

    Attributes:
        block: Its first block.
        serial: Never used twice, so that a slot that was freed is not taken for its successor.
    """

    block: int
    serial: int


@dataclasses.dataclass
class DiskCounters:
    """What the tier did; only ever grow.

    Attributes:
        puts: Pages written.
        puts_full: Pages for which there was no room.
        put_errors: Pages that could not be written.
        gets: Pages read.
        misses: Reads of a slot that does not hold the page, or after reading ended.
        get_errors: Pages that could not be read.
        corrupt: Pages that came back otherwise than they were written.
        bytes_written: Bytes of pages written.
        bytes_read: Bytes of pages read.
        put_ns: Time spent writing pages, checksums included.
        put_max_ns: Longest of them.
        get_ns: Time spent reading pages, checksums included.
        get_max_ns: Longest of them.
    """

    puts: int = 0
    puts_full: int = 0
    put_errors: int = 0
    gets: int = 0
    misses: int = 0
    get_errors: int = 0
    corrupt: int = 0
    bytes_written: int = 0
    bytes_read: int = 0
    put_ns: int = 0
    put_max_ns: int = 0
    get_ns: int = 0
    get_max_ns: int = 0


class DiskTier:
    """Slots of one anonymous file; a context manager.

    Args:
        directory: Where the file is made; must exist.
        max_bytes: Size of the file, headers included; rounded down to whole blocks. All of it is
            taken at once.
        block_bytes: What slots are rounded up to, a multiple of ``BLOCK_BYTES``.
        max_errors_in_a_row: Failed writes after which nothing more is written, and failed reads
            after which nothing more is read or written.
        open_file: Makes the file; tests give one that fails.

    Attributes:
        counters: Everything that was counted.

    Raises:
        ConfigError: The directory cannot be used, or has not that much room; the message says how
            much would fit.
        ValueError: A number makes no sense.
    """

    def __init__(
        self,
        directory: Path,
        max_bytes: int,
        *,
        block_bytes: int = BLOCK_BYTES,
        max_errors_in_a_row: int = _MAX_ERRORS_IN_A_ROW,
        open_file: Callable[[Path, int], TierFile] = AnonymousFile,
    ) -> None:
        if block_bytes < BLOCK_BYTES or block_bytes % BLOCK_BYTES:
            raise ValueError(
                f"block_bytes must be a multiple of {BLOCK_BYTES} above 0, got {block_bytes}"
            )
        if max_bytes < 2 * block_bytes:
            raise ValueError(
                f"max_bytes must hold a header and a page, at least {2 * block_bytes} bytes, "
                f"got {max_bytes}"
            )
        self._block_bytes = block_bytes
        self._blocks = RangeAllocator(max_bytes // block_bytes)
        self._file = open_file(directory, self._blocks.size * block_bytes)
        self._staging = _Staging(block_bytes)
        self._slots: dict[Slot, SlotHeader] = {}
        # Slots that were found bad: first block and number of blocks.
        self._quarantined: dict[int, int] = {}
        # Pages on their way, likewise.
        self._being_written: dict[int, int] = {}
        self._next_serial = 0
        self._writes = _Strikes(max_errors_in_a_row)
        self._reads = _Strikes(max_errors_in_a_row)
        self.counters = DiskCounters()

    def __enter__(self) -> DiskTier:
        """The tier."""
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Close the tier."""
        self.close()

    def close(self) -> None:
        """Give the disk's space back; idempotent."""
        self._file.close()

    @property
    def num_bytes(self) -> int:
        """Bytes of the file."""
        return self._blocks.size * self._block_bytes

    @property
    def free_bytes(self) -> int:
        """Bytes of the file that no slot takes, in whatever pieces."""
        return self._blocks.num_free * self._block_bytes

    @property
    def quarantined_bytes(self) -> int:
        """Bytes of the file that were found bad and are not used any more."""
        return sum(self._quarantined.values()) * self._block_bytes

    @property
    def num_slots(self) -> int:
        """Pages that lie here."""
        return len(self._slots)

    @property
    def is_direct(self) -> bool:
        """Whether pages go past the page cache."""
        return bool(getattr(self._file, "is_direct", False))

    @property
    def is_writable(self) -> bool:
        """Whether pages are still taken."""
        return self.is_readable and not self._writes.are_out

    @property
    def is_readable(self) -> bool:
        """Whether pages are still given back."""
        return not self._reads.are_out

    def slot_bytes(self, page_bytes: int) -> int:
        """Bytes of the file that a page takes."""
        return self._num_blocks(page_bytes) * self._block_bytes

    def put(self, identity: PageIdentity, data: memoryview) -> Slot | None:
        """Write a page.

        Args:
            identity: What ``get`` has to ask for.
            data: The page's bytes, one-dimensional; must not change meanwhile. Whole blocks that
                begin at a memory page are written from where they lie, others are copied first.

        Returns:
            Where it lies; None if there is no room, or it could not be written.
        """
        job = self.begin_put(identity, data)
        if job is None:
            return None
        job.run()
        return self.end_put(job)

    def begin_put(self, identity: PageIdentity, data: memoryview) -> PutJob | None:
        """Take blocks for a page; arguments are those of ``put``.

        Returns:
            What has to be run and then given to ``end_put``; None if there is no room, or nothing
            is written any more.
        """
        if not self.is_writable:
            return None
        num_blocks = self._num_blocks(data.nbytes)
        block = self._blocks.allocate(num_blocks)
        if block is None:
            self.counters.puts_full += 1
            return None
        self._being_written[block] = num_blocks
        return PutJob(self._file, self._staging, identity, data, block, self._block_bytes)

    def end_put(self, job: PutJob) -> Slot | None:
        """Note what became of a page that was to be written; see ``put``."""
        del self._being_written[job.block]
        if job.header is None:
            self._blocks.free(job.block)
            self.counters.put_errors += 1
            if self._writes.one_more():
                _LOG.error(
                    "nothing more is spilled to disk after %d errors in a row (%s); what lies "
                    "there stays readable",
                    self._writes.limit,
                    job.error,
                )
            return None
        self._writes.over()
        slot = Slot(job.block, self._next_serial)
        self._next_serial += 1
        self._slots[slot] = job.header
        counters = self.counters
        counters.puts += 1
        counters.bytes_written += job.data.nbytes
        counters.put_ns += job.took_ns
        counters.put_max_ns = max(counters.put_max_ns, job.took_ns)
        return slot

    def get(self, slot: Slot, identity: PageIdentity, into: memoryview) -> bool:
        """Read a page.

        Args:
            slot: Where it lies.
            identity: Which it must be.
            into: Gets its bytes; one-dimensional, writable, of the page's length. Zeros if they
                turn out to be wrong.

        Returns:
            Whether ``into`` holds the page. After a False the slot is of no use any more, unless
            it was another page's.
        """
        job = self.begin_get(slot, identity, into)
        if job is None:
            return False
        job.run()
        return self.end_get(job)

    def begin_get(self, slot: Slot, identity: PageIdentity, into: memoryview) -> GetJob | None:
        """Look a page up; arguments are those of ``get``.

        Returns:
            What has to be run and then given to ``end_get``, and until then the slot must not be
            freed; None if it does not hold that page, or nothing is read any more.
        """
        header = self._slots.get(slot)
        if (
            header is None
            or (header.identity, header.num_bytes) != (identity, into.nbytes)
            or not self.is_readable
        ):
            self.counters.misses += 1
            return None
        return GetJob(self._file, self._staging, slot, header, into, self._block_bytes)

    def end_get(self, job: GetJob) -> bool:
        """Note what became of a page that was to be read; see ``get``."""
        if job.error is not None:
            self.counters.get_errors += 1
            self._set_aside(job.slot, job.into, job.error)
            return False
        if not job.is_whole:
            self.counters.corrupt += 1
            self._set_aside(job.slot, job.into, "its bytes are not those that were written")
            return False
        self._reads.over()
        counters = self.counters
        counters.gets += 1
        counters.bytes_read += job.into.nbytes
        counters.get_ns += job.took_ns
        counters.get_max_ns = max(counters.get_max_ns, job.took_ns)
        return True

    def free(self, slot: Slot) -> None:
        """Forget a page; nothing happens if it is gone already."""
        if self._slots.pop(slot, None) is not None:
            self._blocks.free(slot.block)

    def check_integrity(self) -> None:
        """Verify that every block is free, or one slot's, or being written, or set aside.

        Raises:
            IntegrityError: One is not.
        """
        self._blocks.check_integrity()
        owned = {
            slot.block: self._num_blocks(header.num_bytes) for slot, header in self._slots.items()
        }
        owned |= self._quarantined | self._being_written
        num_owners = len(self._slots) + len(self._quarantined) + len(self._being_written)
        if len(owned) != num_owners:
            raise IntegrityError("two slots begin at one block")
        if owned != self._blocks.allocated():
            raise IntegrityError("slots and the blocks that are taken differ")

    def _num_blocks(self, num_bytes: int) -> int:
        return 1 + -(-num_bytes // self._block_bytes)

    def _set_aside(self, slot: Slot, into: memoryview, reason: str) -> None:
        into[:] = bytes(into.nbytes)
        self._quarantined[slot.block] = self._num_blocks(self._slots.pop(slot).num_bytes)
        if self._reads.one_more():
            _LOG.error(
                "the disk tier is off after %d failed reads in a row (%s); the pages that lie "
                "there are lost",
                self._reads.limit,
                reason,
            )


class PutJob:
    """A page on its way to disk.

    Attributes:
        data: Its bytes.
        block: Where it goes.
        header: What was written; None before ``run``, and if that failed.
        error: Why it failed.
        took_ns: Time that ``run`` took, the checksum included.
    """

    def __init__(
        self,
        file: TierFile,
        staging: _Staging,
        identity: PageIdentity,
        data: memoryview,
        block: int,
        block_bytes: int,
    ) -> None:
        self._file = file
        self._staging = staging
        self._identity = identity
        self._offset = block * block_bytes
        self.data = data
        self.block = block
        self.header: SlotHeader | None = None
        self.error = ""
        self.took_ns = 0

    def run(self) -> None:
        """Write it; raises nothing."""
        started_ns = time.perf_counter_ns()
        header = SlotHeader(self._identity, self.data.nbytes, checksum(self.data))
        try:
            write_whole(self._file, self._staging.filled(header.pack(), self.data), self._offset)
        except OSError as error:
            self.error = str(error)
        else:
            self.header = header
        self.took_ns = time.perf_counter_ns() - started_ns


class GetJob:
    """A page on its way back.

    Attributes:
        slot: Where it lies.
        into: Where it goes.
        is_whole: Whether it came as it was written; False before ``run``.
        error: Why it could not be read; None if it could.
        took_ns: Time that ``run`` took, the checksum included.
    """

    def __init__(
        self,
        file: TierFile,
        staging: _Staging,
        slot: Slot,
        header: SlotHeader,
        into: memoryview,
        block_bytes: int,
    ) -> None:
        self._file = file
        self._staging = staging
        self._header = header
        self._offset = slot.block * block_bytes
        self.slot = slot
        self.into = into
        self.is_whole = False
        self.error: str | None = None
        self.took_ns = 0

    def run(self) -> None:
        """Read it; raises nothing."""
        started_ns = time.perf_counter_ns()
        header_block, page = self._staging.room_for(self.into)
        try:
            read_whole(self._file, [header_block, page], self._offset)
        except OSError as error:
            self.error = str(error)
        else:
            if page is not self.into:
                self.into[:] = page[: self.into.nbytes]
            found = read_header(header_block)
            self.is_whole = found == self._header and checksum(self.into) == self._header.checksum
        self.took_ns = time.perf_counter_ns() - started_ns


class _Strikes:
    """Errors in a row, until there were too many for good.

    Attributes:
        limit: How many are too many.
        are_out: Whether there were.
    """

    def __init__(self, limit: int) -> None:
        if limit < 1:
            raise ValueError(f"max_errors_in_a_row must be at least 1, got {limit}")
        self.limit = limit
        self.are_out = False
        self._in_a_row = 0

    def one_more(self) -> bool:
        """Note an error; whether it was the last that is borne."""
        self._in_a_row += 1
        was_out, self.are_out = self.are_out, self.are_out or self._in_a_row >= self.limit
        return self.are_out and not was_out

    def over(self) -> None:
        """Note that it works again."""
        self._in_a_row = 0


class _Staging:
    """A header block, and room for pages that cannot be moved from or to where they lie."""

    def __init__(self, block_bytes: int) -> None:
        self._block_bytes = block_bytes
        # Mappings begin at memory pages.
        self._header = memoryview(mmap.mmap(-1, block_bytes))
        self._page = memoryview(b"")

    def filled(self, header: bytes, data: memoryview) -> list[memoryview]:
        """Parts to write: a header, and a page or its copy."""
        header_block, page = self.room_for(data)
        header_block[:HEADER_BYTES] = header
        if page is not data:
            page[: data.nbytes] = data
            page[data.nbytes :] = bytes(page.nbytes - data.nbytes)
        return [header_block, page]

    def room_for(self, data: memoryview) -> tuple[memoryview, memoryview]:
        """The header block, and a page's own memory or as many whole blocks that stand for it."""
        is_whole = data.nbytes > 0 and data.nbytes % self._block_bytes == 0
        if is_whole and _address(data) % BLOCK_BYTES == 0:
            return self._header, data
        num_bytes = -(-data.nbytes // self._block_bytes) * self._block_bytes
        if self._page.nbytes < num_bytes:
            self._page = memoryview(mmap.mmap(-1, num_bytes))
        return self._header, self._page[:num_bytes]


def _address(data: memoryview) -> int:
    return int(np.frombuffer(data, dtype=np.uint8).ctypes.data)
