"""Clients come, use pages and go: one owner for every byte, clean before the next owner."""

from __future__ import annotations

from typing import cast

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    precondition,
    rule,
)

from memd.errors import PoolFull
from memd.protocol import KVLayout
from memd.store import ClientRecord, OutOfRange, PageState, Store, WrongState

REGION_BYTES = 1 << 18
MEMORY_BYTES = REGION_BYTES * 3 // 4
DISK_BYTES = REGION_BYTES // 2
LAYOUT = KVLayout(num_heads=2, head_dim=32, dtype="float32", page_tokens=8)


class StoreMachine(RuleBasedStateMachine):
    clients = Bundle("clients")

    def __init__(self) -> None:
        super().__init__()
        self.store = Store(REGION_BYTES, memory_bytes=MEMORY_BYTES, disk_bytes=DISK_BYTES)
        # The model: what each byte holds (0 is clean), and the state of every page.
        self.memory = np.zeros(REGION_BYTES, dtype=np.uint8)
        self.states: dict[int, list[PageState]] = {}

    @rule(
        target=clients,
        num_pages=st.integers(1, 40),
        landing_rows=st.integers(0, 40),
        host_share=st.sampled_from([1.0, 0.5, 0.0]),
    )
    def register(self, num_pages: int, landing_rows: int, host_share: float) -> object:
        try:
            record = self.store.register(
                pid=1,
                name="",
                layout=LAYOUT,
                num_pages=num_pages,
                landing_rows=landing_rows,
                host_pages=max(1, int(num_pages * host_share)),
                slot_bytes=LAYOUT.page_bytes + 4096,
            )
        except PoolFull:
            return multiple()
        extent = self.memory[record.extent_offset :][: record.extent_bytes]
        assert not extent.any(), "another client's bytes"
        extent[:] = record.client_id % 255 + 1
        self.states[record.client_id] = [PageState.FREE] * num_pages
        return record

    @rule(record=consumes(clients))
    def unregister(self, record: ClientRecord) -> None:
        extent = self.memory[record.extent_offset :][: record.extent_bytes]
        assert (extent == record.client_id % 255 + 1).all(), "somebody else wrote here"
        self.store.unregister(record.client_id)
        del self.states[record.client_id]

    @precondition(lambda self: self.store.dirty_bytes)
    @rule(max_bytes=st.integers(1, REGION_BYTES))
    def scrub(self, max_bytes: int) -> None:
        offset, length = cast("tuple[int, int]", self.store.next_dirty(max_bytes))
        assert 0 < length <= max_bytes
        self.memory[offset : offset + length] = 0
        self.store.mark_clean(offset, length)

    @rule(record=clients, num_pages=st.integers(0, 45))
    def reserve(self, record: ClientRecord, num_pages: int) -> None:
        states = self.states[record.client_id]
        free = [page for page, state in enumerate(states) if state is PageState.FREE]
        page_ids = record.pages.reserve(num_pages)
        if num_pages > len(free):
            assert page_ids is None
            return
        assert page_ids is not None
        assert page_ids.tolist() == free[:num_pages]
        for page in page_ids:
            states[page] = PageState.RESERVED

    @rule(record=clients, ids=st.lists(st.integers(-1, 41), max_size=6))
    def commit(self, record: ClientRecord, ids: list[int]) -> None:
        self.change(record, ids, record.pages.commit, {PageState.RESERVED}, PageState.SEALED)

    @rule(record=clients, ids=st.lists(st.integers(-1, 41), max_size=6))
    def release(self, record: ClientRecord, ids: list[int]) -> None:
        held = {PageState.RESERVED, PageState.SEALED, PageState.FROZEN}
        self.change(record, ids, record.pages.release, held, PageState.FREE)

    @rule(record=clients, ids=st.lists(st.integers(-1, 41), max_size=6))
    def freeze(self, record: ClientRecord, ids: list[int]) -> None:
        self.change(record, ids, record.pages.freeze, {PageState.SEALED}, PageState.FROZEN)

    @rule(record=clients, ids=st.lists(st.integers(-1, 41), max_size=6))
    def thaw(self, record: ClientRecord, ids: list[int]) -> None:
        self.change(record, ids, record.pages.thaw, {PageState.FROZEN}, PageState.SEALED)

    @rule(record=clients, page=st.integers(0, 39))
    def release_while_it_is_read(self, record: ClientRecord, page: int) -> None:
        states = self.states[record.client_id]
        if page >= len(states) or states[page] not in (PageState.SEALED, PageState.FROZEN):
            return
        record.pages.pin(np.array([page]))
        assert record.pages.release([page]).size == 0
        assert record.pages.state(page) is PageState.LEAVING
        record.pages.check_integrity()
        assert record.pages.unpin(np.array([page])).tolist() == [page]
        states[page] = PageState.FREE

    def change(self, record, ids, verb, allowed, new) -> None:  # type: ignore[no-untyped-def]
        states = self.states[record.client_id]
        is_named_well = len(set(ids)) == len(ids) and all(0 <= i < len(states) for i in ids)
        if not is_named_well:
            with pytest.raises(OutOfRange):
                verb(ids)
        elif not all(states[page] in allowed for page in ids):
            with pytest.raises(WrongState):
                verb(ids)
        else:
            verb(ids)
            for page in ids:
                states[page] = new

    @rule(record=clients, page=st.integers(0, 39))
    def read(self, record: ClientRecord, page: int) -> None:
        states = self.states[record.client_id]
        if page >= len(states):
            return
        if states[page] in (PageState.SEALED, PageState.FROZEN):
            record.pages.require_readable(np.array([page]))
        else:
            with pytest.raises(WrongState):
                record.pages.require_readable(np.array([page]))

    @invariant()
    def holds(self) -> None:
        self.store.check_integrity()
        for record in self.store.clients:
            states = self.states[record.client_id]
            assert [record.pages.state(page) for page in range(len(states))] == states


TestStoreMachine = StoreMachine.TestCase
