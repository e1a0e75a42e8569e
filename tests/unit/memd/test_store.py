from __future__ import annotations

import mmap

import numpy as np
import pytest

from memd.errors import IntegrityError, PoolFull
from memd.protocol import KVLayout
from memd.store import ClientRecord, OutOfRange, PageState, PageTable, Store, WrongState

LAYOUT = KVLayout(num_heads=2, head_dim=64, dtype="float32", page_tokens=8)
PAGE = LAYOUT.page_bytes


def register(store: Store, *, num_pages: int = 1, landing_rows: int = 8) -> ClientRecord:
    return store.register(
        pid=1, name="test", layout=LAYOUT, num_pages=num_pages, landing_rows=landing_rows
    )


class TestPageTable:
    def test_a_page_goes_from_free_over_reserved_and_sealed_to_free(self) -> None:
        pages = PageTable(4)
        ids = pages.reserve(2)
        assert ids is not None
        assert [pages.state(page) for page in range(4)] == [1, 1, 0, 0]
        pages.commit(ids)
        assert pages.count(PageState.SEALED) == 2
        pages.release(ids)
        assert pages.count(PageState.FREE) == 4

    def test_reserve_gives_all_or_nothing(self) -> None:
        pages = PageTable(3)
        assert pages.reserve(4) is None
        assert pages.count(PageState.FREE) == 3
        ids = pages.reserve(3)
        assert ids is not None
        assert ids.dtype == np.int64
        assert ids.tolist() == [0, 1, 2]

    def test_reserving_no_page_gives_no_page(self) -> None:
        ids = PageTable(1).reserve(0)
        assert ids is not None
        assert ids.size == 0

    def test_a_reserved_page_can_be_released_without_a_commit(self) -> None:
        pages = PageTable(1)
        pages.reserve(1)
        pages.release([0])
        assert pages.state(0) is PageState.FREE

    def test_only_reserved_pages_are_committed(self) -> None:
        pages = PageTable(2)
        with pytest.raises(WrongState, match="page 0 is FREE"):
            pages.commit([0])
        pages.reserve(1)
        pages.commit([0])
        with pytest.raises(WrongState, match="page 0 is SEALED"):
            pages.commit([0])

    def test_a_free_page_is_not_released(self) -> None:
        with pytest.raises(WrongState, match="page 1 is FREE and 1 more"):
            PageTable(3).release([1, 2])

    @pytest.mark.parametrize("ids", [[-1], [2], [0, 5]])
    def test_ids_outside_the_pages_are_refused(self, ids: list[int]) -> None:
        pages = PageTable(2)
        pages.reserve(2)
        with pytest.raises(OutOfRange, match=r"page ids are 0\.\.1"):
            pages.release(ids)

    def test_a_page_named_twice_is_refused(self) -> None:
        pages = PageTable(2)
        pages.reserve(2)
        with pytest.raises(OutOfRange, match="twice"):
            pages.commit([1, 1])

    def test_a_refused_request_changes_nothing(self) -> None:
        pages = PageTable(3)
        pages.reserve(2)
        pages.commit([0])
        with pytest.raises(WrongState):
            pages.commit([1, 2])
        with pytest.raises(WrongState):
            pages.release([0, 2])
        assert [pages.state(page) for page in range(3)] == [2, 1, 0]

    def test_only_sealed_pages_are_readable(self) -> None:
        pages = PageTable(3)
        pages.reserve(2)
        pages.commit([0])
        pages.require_readable(np.array([0, 0]))
        for page in (1, 2):
            with pytest.raises(WrongState, match=f"only SEALED pages are readable: page {page}"):
                pages.require_readable(np.array([0, page]))

    def test_all_pages_sealed_is_readable_everywhere(self) -> None:
        pages = PageTable(2)
        pages.reserve(2)
        pages.commit([0, 1])
        pages.require_readable(np.array([1, 0, 1]))

    def test_a_table_has_a_page(self) -> None:
        with pytest.raises(ValueError, match="at least 1"):
            PageTable(0)

    def test_a_wrong_count_is_found_by_the_integrity_check(self) -> None:
        pages = PageTable(2)
        pages._states[0] = PageState.SEALED
        with pytest.raises(IntegrityError, match="FREE"):
            pages.check_integrity()

    def test_an_unknown_state_is_found_by_the_integrity_check(self) -> None:
        pages = PageTable(2)
        pages._states[0] = 9
        with pytest.raises(IntegrityError):
            pages.check_integrity()


class TestStore:
    def test_extents_begin_at_mapping_boundaries_and_do_not_overlap(self) -> None:
        store = Store(1 << 20)
        first, second = register(store), register(store, num_pages=3)
        assert first.extent_offset % mmap.ALLOCATIONGRANULARITY == 0
        assert second.extent_offset >= first.extent_offset + first.extent_bytes
        assert first.client_id != second.client_id
        store.check_integrity()

    def test_the_landing_ring_follows_the_pages(self) -> None:
        record = register(Store(1 << 20), num_pages=3, landing_rows=5)
        assert record.landing_offset >= 3 * PAGE
        assert record.landing_offset + 5 * LAYOUT.row_bytes <= record.extent_bytes

    def test_a_full_region_says_what_is_free(self) -> None:
        store = Store(1 << 20)
        with pytest.raises(
            PoolFull, match=r"of 1048576 bytes are free.*room for 127 pages"
        ) as info:
            register(store, num_pages=1000)
        assert "1000 pages" in str(info.value)
        store.check_integrity()

    def test_a_returned_extent_is_not_given_out_before_it_is_clean(self) -> None:
        store = Store(1 << 20)
        record = register(store, num_pages=120)
        store.unregister(record.client_id)
        assert store.dirty_bytes == record.extent_bytes
        with pytest.raises(PoolFull):
            register(store, num_pages=120)
        seen = 0
        while (dirty := store.next_dirty(100_000)) is not None:
            store.check_integrity()
            offset, length = dirty
            assert offset == record.extent_offset + seen
            assert length <= 100_000
            seen += length
            store.mark_clean(offset, length)
        assert seen == record.extent_bytes
        assert store.dirty_bytes == 0
        assert register(store, num_pages=120).extent_offset == record.extent_offset
        store.check_integrity()

    def test_only_the_next_dirty_range_is_marked_clean(self) -> None:
        store = Store(1 << 20)
        record = register(store)
        store.unregister(record.client_id)
        with pytest.raises(ValueError, match="next dirty range"):
            store.mark_clean(record.extent_offset + 1, 10)

    def test_a_client_is_forgotten_once(self) -> None:
        store = Store(1 << 20)
        record = register(store)
        store.unregister(record.client_id)
        with pytest.raises(KeyError):
            store.unregister(record.client_id)

    def test_client_ids_are_never_used_twice(self) -> None:
        store = Store(1 << 20)
        first = register(store)
        store.unregister(first.client_id)
        assert register(store).client_id > first.client_id

    def test_an_extent_without_owner_is_found_by_the_integrity_check(self) -> None:
        store = Store(1 << 20)
        store.extents.allocate(4096)
        with pytest.raises(IntegrityError, match="owners"):
            store.check_integrity()
