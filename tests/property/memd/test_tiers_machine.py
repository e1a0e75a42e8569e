"""The disk tier, the eviction policies and the pages of a client, against models and under faults.

Three machines. One spoils a disk in every way and sees whether a page ever comes back wrong; one
compares each policy with a sort; one runs a client's pages over real memory and a disk that fails.
"""

from __future__ import annotations

import collections
import errno
import mmap
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
)

from memd.store import OutOfRange, WrongState
from memd.tiers.disk import DiskTier, Slot
from memd.tiers.eviction import POLICY_NAMES, eviction_policy
from memd.tiers.extent import ExtentIO
from memd.tiers.files import BLOCK_BYTES
from memd.tiers.header import HEADER_BYTES, PageIdentity
from memd.tiers.holes import allocated_bytes
from memd.tiers.mover import PageMover, Progress
from memd.tiers.runner import Running, run_at_once
from memd.tiers.testing import FakeFile
from memd.tiers.tiered import Place, TieredPages, Use

if TYPE_CHECKING:
    from collections.abc import Callable

    from memd.tiers.runner import Job

NUM_BLOCKS = 24
# Never used up in these runs, where errors are many: what happens then has its own tests.
PATIENCE = 1 << 30


class DiskMachine(RuleBasedStateMachine):
    """A page that comes back is the page that went, whatever happened to the disk."""

    # Of the pages that are held, in turn.
    which = st.integers(0, NUM_BLOCKS)

    def __init__(self) -> None:
        super().__init__()
        self.file = FakeFile(NUM_BLOCKS * BLOCK_BYTES)
        self.tier = DiskTier(
            Path(),
            NUM_BLOCKS * BLOCK_BYTES,
            max_errors_in_a_row=PATIENCE,
            open_file=lambda directory, num_bytes: self.file,
        )
        # The model: what each slot holds, what its blocks held then, and slots that are gone.
        self.held: dict[Slot, tuple[PageIdentity, bytes]] = {}
        self.written: dict[Slot, bytes] = {}
        self.gone: list[Slot] = []
        self.num_puts = 0
        for seed in range(3):
            self.put(seed, 2 * BLOCK_BYTES + 5)

    def pick(self, which: int) -> Slot | None:
        slots = sorted(self.held)
        return slots[which % len(slots)] if slots else None

    def on_disk(self, slot: Slot) -> bytes:
        """What lies in a slot's blocks now."""
        length = BLOCK_BYTES + len(self.held[slot][1])
        return bytes(self.file.data[slot.block * BLOCK_BYTES :][:length])

    def forget(self, slot: Slot) -> None:
        del self.held[slot]
        self.gone.append(slot)

    @rule(
        seed=st.integers(0, 3),
        num_bytes=st.sampled_from([1, BLOCK_BYTES - 1, BLOCK_BYTES, 2 * BLOCK_BYTES + 5]),
    )
    def put(self, seed: int, num_bytes: int) -> None:
        # The same content under several identities, as a write that is lost would leave it.
        data = np.random.default_rng(seed).bytes(num_bytes)
        self.num_puts += 1
        identity = PageIdentity(1 + seed % 2, seed, self.num_puts)
        will_fail = bool(self.file.write_errors)
        will_be_lost = self.file.num_writes_to_lose > 0
        fits = -(-num_bytes // BLOCK_BYTES) + 1 <= self.tier._blocks.largest_free
        slot = self.tier.put(identity, memoryview(data))
        assert (slot is not None) == (fits and not will_fail)
        if slot is not None:
            self.held[slot] = (identity, data)
            self.written[slot] = b"" if will_be_lost else self.on_disk(slot)

    @rule(which=which)
    def get(self, which: int) -> None:
        slot = self.pick(which)
        if slot is None:
            return
        identity, data = self.held[slot]
        is_intact = self.on_disk(slot) == self.written[slot] and not self.file.read_errors
        into = memoryview(bytearray(b"\xee" * len(data)))
        if self.tier.get(slot, identity, into):
            assert into == data
        else:
            assert not is_intact
            assert not any(into)
            self.forget(slot)

    @rule(which=which, more=st.tuples(*[st.integers(0, 1)] * 4))
    def get_another_page(self, which: int, more: tuple[int, int, int, int]) -> None:
        slot = self.pick(which)
        if slot is None or not any(more):
            return
        (owner, page, generation), data = self.held[slot]
        other = PageIdentity(owner + more[0], page + more[1], generation + more[2])
        into = memoryview(bytearray(b"\xee" * (len(data) + more[3])))
        assert not self.tier.get(slot, other, into)
        assert bytes(into) == b"\xee" * into.nbytes

    @rule(which=which, is_held=st.booleans())
    def free(self, which: int, is_held: bool) -> None:
        slot = self.pick(which)
        if is_held and slot is not None:
            self.tier.free(slot)
            self.forget(slot)
        elif self.gone:
            self.tier.free(self.gone[which % len(self.gone)])

    @rule(
        which=which,
        kind=st.sampled_from(
            ["write error", "read error", "lost write", "short", "bit", "header", "misplaced"]
        ),
        number=st.sampled_from([errno.EIO, errno.ENOSPC, errno.EINVAL]),
        noise=st.binary(min_size=1, max_size=2 * HEADER_BYTES),
        byte=st.integers(0, NUM_BLOCKS * BLOCK_BYTES - 1),
    )
    def spoil(self, which: int, kind: str, number: int, noise: bytes, byte: int) -> None:
        slot, other = self.pick(which), self.pick(which + 1)
        match kind:
            case "write error":
                self.file.write_errors = collections.deque([number])
            case "read error":
                self.file.read_errors = collections.deque([number])
            case "lost write" if self.file.most_bytes is None:
                self.file.num_writes_to_lose = 1
            case "short" if not self.file.num_writes_to_lose:
                self.file.most_bytes = None if self.file.most_bytes else 700 + which
            case "bit" if slot is not None:
                byte = slot.block * BLOCK_BYTES + byte % len(self.on_disk(slot))
                self.file.data[byte] ^= 1 << byte % 8
            case "header" if slot is not None:
                start = slot.block * BLOCK_BYTES
                self.file.data[start : start + len(noise)] = noise
            case "misplaced" if slot is not None and other is not None:
                start = other.block * BLOCK_BYTES
                content = self.on_disk(slot)[: len(self.file.data) - start]
                self.file.data[start : start + len(content)] = content

    @invariant()
    def holds(self) -> None:
        self.tier.check_integrity()
        assert self.tier.num_slots == len(self.held)
        assert len(self.file.data) == NUM_BLOCKS * BLOCK_BYTES


class PolicyMachine(RuleBasedStateMachine):
    """Each policy is its definition: a sort of what is on offer."""

    num_pages = 6
    page_sets = st.sets(st.integers(0, num_pages - 1), max_size=num_pages)

    @initialize(name=st.sampled_from(POLICY_NAMES), is_slow=st.booleans())
    def start(self, name: str, is_slow: bool) -> None:
        self.name = name
        self.policy = eviction_policy(name, self.num_pages)
        # The model: depth, uses, rank and last use of the pages that were admitted.
        self.depths: dict[int, int] = {}
        self.uses: dict[int, int] = {}
        self.ranks: dict[int, int] = {}
        self.used: dict[int, int] = {}
        self.offered: set[int] = set()
        self.time = self.age = 0
        everything = set(range(self.num_pages))
        self.admit(everything, 0)
        self.offer(everything)

    def use(self, pages: set[int]) -> None:
        self.time += 1
        for page in pages & self.depths.keys():
            self.used[page] = self.time
            self.uses[page] += 1
            self.ranks[page] = {
                "depth": -self.depths[page],
                "lfu": self.age + self.uses[page],
                "lru": 0,
            }[self.name]

    def order(self) -> list[int]:
        return sorted(self.offered, key=lambda page: (self.ranks[page], self.used[page], page))

    @rule(pages=page_sets, depth=st.integers(0, 3))
    def admit(self, pages: set[int], depth: int) -> None:
        ids = np.array(sorted(pages), dtype=np.int64)
        self.policy.admit(ids, depth + ids % 2)
        for page in pages:
            self.depths[page] = depth + page % 2
            self.uses[page] = 0
        self.offered -= pages
        self.use(pages)

    @rule(pages=page_sets)
    def touch(self, pages: set[int]) -> None:
        self.policy.touch(np.array(sorted(pages & self.depths.keys()), dtype=np.int64))
        self.use(pages)

    @rule(pages=page_sets)
    def offer(self, pages: set[int]) -> None:
        pages &= self.depths.keys()
        self.policy.offer(np.array(sorted(pages), dtype=np.int64))
        self.offered |= pages

    @rule(pages=page_sets)
    def withdraw(self, pages: set[int]) -> None:
        self.policy.withdraw(np.array(sorted(pages), dtype=np.int64))
        self.offered -= pages

    @rule()
    def evict_the_first(self) -> None:
        for page in self.policy.victims(1):
            self.policy.evict(page)
            self.offered.discard(page)
            self.age = max(self.age, self.ranks[page])

    @rule(max_pages=st.integers(0, num_pages + 1))
    def choose(self, max_pages: int) -> None:
        assert self.policy.victims(max_pages) == self.order()[:max_pages]

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "policy"):
            self.policy.check_integrity()


NUM_PAGES, HOST_PAGES, PAGE = 7, 3, BLOCK_BYTES
DISK_BLOCKS = 2 * 4


class TieredMachine(RuleBasedStateMachine):
    """A client's pages keep their bytes, wherever they are moved, or are lost and say so.

    What it runs is all that there is but the disk: a memfd, holes in it, and the mover. Requests
    wait as they do in the daemon, so that anything may happen between two of their steps.
    """

    page_sets = st.sets(st.integers(-1, NUM_PAGES), min_size=1, max_size=4)
    # Mostly a client names pages that are right, or the machine would not get far.
    are_right = st.sampled_from([True, True, True, False])
    pins = Bundle("pins")

    @initialize(name=st.sampled_from(POLICY_NAMES), is_slow=st.booleans())
    def start(self, name: str, is_slow: bool) -> None:
        self.fd = os.memfd_create("test")
        os.ftruncate(self.fd, NUM_PAGES * PAGE)
        memory = np.frombuffer(mmap.mmap(self.fd, NUM_PAGES * PAGE), dtype=np.uint8)
        self.memory = memory.reshape(NUM_PAGES, PAGE)
        self.file = FakeFile(DISK_BLOCKS * BLOCK_BYTES)
        self.disk = DiskTier(
            Path(),
            DISK_BLOCKS * BLOCK_BYTES,
            max_errors_in_a_row=PATIENCE,
            open_file=lambda directory, num_bytes: self.file,
        )
        # What a slow disk has not done yet.
        self.running: list[Running] = []
        self.io = ExtentIO(
            self.disk,
            owner=1,
            memory=memory,
            fd=self.fd,
            extent_offset=0,
            page_bytes=PAGE,
            run=self.run_later if is_slow else run_at_once,
        )
        self.pages = TieredPages(NUM_PAGES, HOST_PAGES, eviction_policy(name, NUM_PAGES))
        self.mover = PageMover(self.pages, self.io)
        # The model: use, content and readers of each page, and those whose bytes may be gone.
        self.uses = [Use.FREE] * NUM_PAGES
        self.contents = [0] * NUM_PAGES
        self.num_pins = [0] * NUM_PAGES
        self.num_writes = 0
        self.was_spoilt = False
        # Nothing is of interest before some pages are on disk.
        self.store_a_prompt(HOST_PAGES)
        self.store_a_prompt(2)

    def teardown(self) -> None:
        if hasattr(self, "fd"):
            self.settle()
            self.io.close()
            assert self.disk.num_slots == 0
            os.close(self.fd)

    def run_later(self, job: Job) -> Running:
        """What the daemon's thread is."""
        self.running.append(Running(job))
        return self.running[-1]

    def settle(self) -> None:
        """Let the page that is on its way arrive, and have the books done."""
        self.arrive()
        self.mover.keep_room(0)

    @rule()
    def arrive(self) -> None:
        while self.running:
            self.running.pop().run()

    def write(self, page: int) -> None:
        """The client writes a whole page, each time something else."""
        self.num_writes += 1
        self.contents[page] = self.num_writes % 255 + 1
        self.memory[page] = self.contents[page]

    def bring(self, pages: list[int], most_steps: int = 6 * NUM_PAGES) -> bool:
        """Step until the pages are there; False if there is no room for them."""
        for _ in range(most_steps):
            progress = self.mover.bring(pages)
            if progress is Progress.MOVING:
                self.arrive()
            elif progress is not Progress.MOVED:
                return progress is Progress.DONE
        raise AssertionError("it never ends")

    def change(
        self,
        ids: set[int],
        are_right: bool,
        verb: Callable[[list[int]], object],
        is_right: Callable[[int], bool],
    ) -> list[int]:
        """Call a verb that must be refused unless all pages are right for it.

        Returns:
            The pages that it changed.
        """
        pages = sorted(ids)
        if are_right:
            right = [page for page in range(NUM_PAGES) if is_right(page)]
            pages = [page for page in right if page in ids] or right[:1]
        if any(not 0 <= page < NUM_PAGES for page in pages):
            with pytest.raises(OutOfRange):
                verb(pages)
            return []
        if not all(is_right(page) for page in pages):
            with pytest.raises(WrongState):
                verb(pages)
            return []
        verb(pages)
        return pages

    def reserve(self, num_pages: int) -> list[int]:
        """Reserve pages, make room for them and write them; none if there is no room."""
        free = [page for page in range(NUM_PAGES) if self.uses[page] is Use.FREE][:num_pages]
        self.pages.reserve(free)
        if not self.bring(free):
            self.mover.release(free)
            return []
        for page in free:
            self.uses[page] = Use.RESERVED
            self.write(page)
        return free

    @rule(num_pages=st.integers(1, 4))
    def reserve_under_pressure(self, num_pages: int) -> None:
        self.reserve(num_pages)

    @rule(num_pages=st.integers(1, HOST_PAGES))
    def store_a_prompt(self, num_pages: int) -> None:
        pages = self.reserve(num_pages)
        self.pages.commit(pages)
        self.pages.freeze(pages, range(len(pages)))
        for page in pages:
            self.uses[page] = Use.FROZEN

    @rule(ids=page_sets, are_right=are_right)
    def commit(self, ids: set[int], are_right: bool) -> None:
        for page in self.change(
            ids, are_right, self.pages.commit, lambda page: self.uses[page] is Use.RESERVED
        ):
            self.uses[page] = Use.SEALED

    @rule(ids=page_sets, are_right=are_right, has_depths=st.booleans())
    def freeze(self, ids: set[int], are_right: bool, has_depths: bool) -> None:
        for page in self.change(
            ids,
            are_right,
            lambda pages: self.pages.freeze(pages, pages if has_depths else None),
            lambda page: self.uses[page] is Use.SEALED,
        ):
            self.uses[page] = Use.FROZEN

    @rule(ids=page_sets, are_right=are_right, is_brought=st.booleans())
    def thaw(self, ids: set[int], are_right: bool, is_brought: bool) -> None:
        if is_brought:
            # As a client's request does: pinned until it is answered.
            frozen = [page for page, use in enumerate(self.uses) if use is Use.FROZEN]
            frozen = [page for page in frozen if page in ids]
            self.pages.pin(frozen)
            self.bring(frozen)
            self.pages.unpin(frozen)
        for page in self.change(
            ids,
            are_right,
            self.pages.thaw,
            lambda page: self.uses[page] is Use.FROZEN and self.pages.place(page) is not Place.DISK,
        ):
            self.uses[page] = Use.SEALED
            if self.pages.place(page) is Place.HOST:
                self.check_content(page)
                self.write(page)

    @rule(ids=page_sets, are_right=are_right)
    def release(self, ids: set[int], are_right: bool) -> None:
        for page in self.change(
            ids,
            are_right,
            self.mover.release,
            lambda page: self.uses[page] is not Use.FREE and not self.num_pins[page],
        ):
            self.uses[page] = Use.FREE

    @rule(target=pins, ids=page_sets, are_right=are_right)
    def pin(self, ids: set[int], are_right: bool) -> object:
        pages = self.change(
            ids, are_right, self.pages.pin, lambda page: self.uses[page] >= Use.SEALED
        )
        self.pages.touch(pages)
        for page in pages:
            self.num_pins[page] += 1
        return pages if pages else multiple()

    @rule(pages=consumes(pins))
    def unpin(self, pages: list[int]) -> None:
        # Nobody gives up while a page that he waits for is on its way.
        self.settle()
        self.pages.unpin(pages)
        for page in pages:
            self.num_pins[page] -= 1

    @rule(pages=pins)
    def step_of_a_fetch(self, pages: list[int]) -> None:
        self.mover.bring(pages)

    @rule(ids=page_sets, which=st.integers(0, NUM_PAGES))
    def fetch(self, ids: set[int], which: int) -> None:
        on_disk = [page for page in range(NUM_PAGES) if self.pages.place(page) is Place.DISK]
        if on_disk:
            ids = {on_disk[which % len(on_disk)], min(ids)}
        pages = [page for page, use in enumerate(self.uses) if use >= Use.SEALED and page in ids]
        self.pages.pin(pages)
        self.pages.touch(pages)
        if self.bring(pages):
            lost = set(self.pages.lost_among(pages).tolist())
            for page in pages:
                assert self.pages.place(page) is (Place.LOST if page in lost else Place.HOST)
                if page not in lost:
                    self.check_content(page)
        self.pages.unpin(pages)

    @rule(num_pages=st.integers(1, HOST_PAGES))
    def keep_room(self, num_pages: int) -> None:
        while self.mover.keep_room(num_pages) is Progress.MOVED:
            pass

    @rule(
        kind=st.sampled_from(["write error", "read error", "lost write", "flipped bit"]),
        number=st.sampled_from([errno.EIO, errno.ENOSPC]),
        byte=st.integers(0, DISK_BLOCKS * BLOCK_BYTES - 1),
    )
    def spoil(self, kind: str, number: int, byte: int) -> None:
        if kind == "write error":
            self.file.write_errors = collections.deque([number])
            return
        self.was_spoilt = True
        if kind == "read error":
            self.file.read_errors = collections.deque([number])
        elif kind == "lost write":
            self.file.num_writes_to_lose = 1
        elif self.disk.num_slots:
            slots = list(self.io._slots.values())
            start = slots[byte % len(slots)].block * BLOCK_BYTES
            self.file.data[start + byte % (BLOCK_BYTES + PAGE)] ^= 1 << byte % 8

    def check_content(self, page: int) -> None:
        assert (self.memory[page] == self.contents[page]).all()

    @invariant()
    def holds(self) -> None:
        if not hasattr(self, "pages"):
            return
        self.pages.check_integrity()
        self.disk.check_integrity()
        places = [self.pages.place(page) for page in range(NUM_PAGES)]
        assert [self.pages.use(page) for page in range(NUM_PAGES)] == self.uses
        assert places.count(Place.HOST) <= HOST_PAGES
        assert places.count(Place.DISK) == self.disk.num_slots
        assert self.was_spoilt or Place.LOST not in places
        moving = self.mover._moving
        num_coming = moving is not None and not moving.is_spill
        assert allocated_bytes(self.fd) == (places.count(Place.HOST) + num_coming) * PAGE
        for page, place in enumerate(places):
            if self.uses[page] in (Use.RESERVED, Use.SEALED):
                assert place in (Place.HOST, Place.LOST)
            if self.uses[page] is not Use.FREE and place is Place.HOST:
                self.check_content(page)
        for num_pages in range(NUM_PAGES + 1):
            plan = self.pages.plan_room(num_pages)
            if plan is None:
                continue
            num_short = num_pages - self.pages.host_room
            assert len(plan.to_empty) + len(plan.to_spill) == max(0, num_short)
            assert all(self.uses[page] is Use.FREE for page in plan.to_empty)
            for page in plan.to_spill:
                assert self.uses[page] is Use.FROZEN
                assert not self.num_pins[page]


TestDiskMachine = DiskMachine.TestCase
TestPolicyMachine = PolicyMachine.TestCase
TestTieredMachine = TieredMachine.TestCase


@given(st.binary(min_size=1, max_size=BLOCK_BYTES), st.integers(0, BLOCK_BYTES - 1))
def test_a_header_block_with_any_bytes_in_it_gives_the_page_or_nothing(
    written: bytes, start: int
) -> None:
    file = FakeFile(4 * BLOCK_BYTES)
    tier = DiskTier(Path(), len(file.data), open_file=lambda directory, num_bytes: file)
    identity, data = PageIdentity(1, 2, 3), bytes(range(256)) * 16
    slot = tier.put(identity, memoryview(data))
    assert slot is not None
    before = bytes(file.data[:HEADER_BYTES])
    end = min(BLOCK_BYTES, start + len(written))
    file.data[start:end] = written[: end - start]
    into = memoryview(bytearray(len(data)))
    is_there = tier.get(slot, identity, into)
    assert is_there == (bytes(file.data[:HEADER_BYTES]) == before)
    assert bytes(into) == (data if is_there else bytes(len(data)))
