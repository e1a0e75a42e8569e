from __future__ import annotations

import errno
import logging
import mmap
from pathlib import Path

import pytest

from memd.errors import ConfigError, IntegrityError
from memd.tiers.disk import DiskTier
from memd.tiers.files import BLOCK_BYTES
from memd.tiers.header import HEADER_BYTES, PageIdentity, SlotHeader, checksum
from memd.tiers.testing import FakeFile

PAGE = 2 * BLOCK_BYTES
PAGE_A, PAGE_B = PageIdentity(1, 7, 1), PageIdentity(1, 8, 2)


def tier_on_fake(num_blocks: int = 12) -> tuple[DiskTier, FakeFile]:
    fake = FakeFile(num_blocks * BLOCK_BYTES)
    return DiskTier(Path(), len(fake.data), open_file=lambda directory, num_bytes: fake), fake


def page(value: int, num_bytes: int = PAGE) -> memoryview:
    """Bytes that begin at a memory page, as pages of a region do."""
    memory = mmap.mmap(-1, num_bytes)
    memory[:] = bytes((value + i // 512) % 256 for i in range(num_bytes))
    return memoryview(memory)


def empty(num_bytes: int = PAGE) -> memoryview:
    return memoryview(bytearray(b"\xee" * num_bytes))


class TestOnARealFile:
    @pytest.mark.parametrize("num_bytes", [1, 4095, 4096, 4097, 3 * 4096, 100_000])
    def test_pages_come_back_as_they_went(self, tmp_path: Path, num_bytes: int) -> None:
        with DiskTier(tmp_path, 1 << 20) as tier:
            data = [page(value, num_bytes) for value in range(4)]
            slots = [tier.put(PageIdentity(1, i, 1), data[i]) for i in range(4)]
            for i in (2, 0, 3, 1, 1):
                slot, into = slots[i], page(99, num_bytes)
                assert slot is not None
                assert tier.get(slot, PageIdentity(1, i, 1), into)
                assert into == data[i]
            tier.check_integrity()

    def test_memory_at_any_address_will_do(self, tmp_path: Path) -> None:
        with DiskTier(tmp_path, 1 << 20) as tier:
            slot = tier.put(PAGE_A, page(1, PAGE + 5)[5:])
            assert slot is not None
            into = empty(PAGE + 3)
            assert tier.get(slot, PAGE_A, into[3:])
            assert into[3:] == page(1, PAGE + 5)[5:]
            assert into[:3] == empty(3)

    def test_what_does_not_fit_is_refused_at_the_start(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="ask for at most --disk-bytes"):
            DiskTier(tmp_path, 1 << 60)

    def test_a_closed_tier_takes_and_gives_nothing(self, tmp_path: Path) -> None:
        tier = DiskTier(tmp_path, 1 << 20)
        slot = tier.put(PAGE_A, page(1))
        assert slot is not None
        tier.close()
        tier.close()
        assert tier.put(PAGE_B, page(2)) is None
        assert not tier.get(slot, PAGE_A, empty())


class TestRoom:
    def test_a_full_tier_takes_no_page_until_one_is_freed(self) -> None:
        tier, _ = tier_on_fake(num_blocks=7)
        first, second = tier.put(PAGE_A, page(1)), tier.put(PAGE_B, page(2))
        assert first is not None
        assert second is not None
        assert tier.put(PageIdentity(1, 9, 3), page(3)) is None
        assert tier.counters.puts_full == 1
        tier.free(first)
        assert tier.put(PageIdentity(1, 9, 3), page(3)) is not None
        assert tier.num_slots == 2
        assert tier.free_bytes == BLOCK_BYTES
        tier.check_integrity()

    def test_freeing_twice_does_not_free_the_successor(self) -> None:
        tier, _ = tier_on_fake(num_blocks=3)
        first = tier.put(PAGE_A, page(1))
        assert first is not None
        tier.free(first)
        second = tier.put(PAGE_B, page(2))
        assert second is not None
        assert second.block == first.block
        tier.free(first)
        assert tier.get(second, PAGE_B, empty())
        assert not tier.get(first, PAGE_B, empty())

    def test_slots_are_whole_blocks_of_the_given_size(self) -> None:
        fake = FakeFile(5 * 16384)
        tier = DiskTier(
            Path(),
            5 * 16384 + 5,
            block_bytes=16384,
            open_file=lambda directory, num_bytes: fake,
        )
        assert tier.num_bytes == 5 * 16384
        tier.put(PAGE_A, page(1))
        assert tier.free_bytes == 3 * 16384

    @pytest.mark.parametrize(
        "wrong",
        [
            {"max_bytes": 4096},
            {"block_bytes": 0},
            {"block_bytes": 5000},
            {"max_errors_in_a_row": 0},
        ],
    )
    def test_numbers_that_make_no_sense_are_refused(self, wrong: dict[str, int]) -> None:
        options = {"max_bytes": 1 << 20} | wrong
        with pytest.raises(ValueError):
            DiskTier(Path(), open_file=lambda directory, num_bytes: FakeFile(num_bytes), **options)  # type: ignore[arg-type]


class TestNeverWrongBytes:
    @pytest.mark.parametrize("other", [(2, 7, 1), (1, 8, 1), (1, 7, 2)])
    def test_another_owner_page_or_generation_is_a_miss(self, other: tuple[int, ...]) -> None:
        tier, _ = tier_on_fake()
        slot = tier.put(PAGE_A, page(1))
        assert slot is not None
        into = empty()
        assert not tier.get(slot, PageIdentity(*other), into)
        assert into == empty()
        assert tier.counters.misses == 1
        assert tier.get(slot, PAGE_A, into), "asking for another page harms nothing"

    def test_another_length_is_a_miss(self) -> None:
        tier, _ = tier_on_fake()
        slot = tier.put(PAGE_A, page(1))
        assert slot is not None
        assert not tier.get(slot, PAGE_A, empty(PAGE - 1))
        assert tier.counters.misses == 1

    @pytest.mark.parametrize("byte", [0, 8, HEADER_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + PAGE - 1])
    def test_a_wrong_bit_anywhere_is_found(self, byte: int) -> None:
        tier, fake = tier_on_fake()
        slot = tier.put(PAGE_A, page(1))
        assert slot is not None
        fake.data[slot.block * BLOCK_BYTES + byte] ^= 4
        into = empty()
        assert not tier.get(slot, PAGE_A, into)
        assert bytes(into) == bytes(PAGE)
        assert tier.counters.corrupt == 1

    def test_a_write_that_the_disk_forgot_is_found(self) -> None:
        tier, fake = tier_on_fake()
        first = tier.put(PAGE_A, page(1))
        assert first is not None
        tier.free(first)
        fake.num_writes_to_lose = 1
        second = tier.put(PAGE_B, page(2))
        assert second is not None
        assert second.block == first.block
        assert not tier.get(second, PAGE_B, empty())

    def test_a_slot_that_lies_elsewhere_is_found_though_it_is_whole(self) -> None:
        tier, fake = tier_on_fake()
        first, second = tier.put(PAGE_A, page(1)), tier.put(PAGE_B, page(2))
        assert first is not None
        assert second is not None
        length = BLOCK_BYTES + PAGE
        start = second.block * BLOCK_BYTES
        fake.data[:length] = fake.data[start : start + length]
        assert not tier.get(first, PAGE_A, empty())

    def test_a_valid_header_over_other_bytes_is_found(self) -> None:
        tier, fake = tier_on_fake()
        slot = tier.put(PAGE_A, page(1))
        assert slot is not None
        forged = SlotHeader(PAGE_A, PAGE, checksum(page(2)))
        fake.data[:HEADER_BYTES] = forged.pack()
        fake.data[BLOCK_BYTES : BLOCK_BYTES + PAGE] = page(2)
        assert not tier.get(slot, PAGE_A, empty())

    def test_a_bad_slot_is_set_aside_for_good(self) -> None:
        tier, fake = tier_on_fake(num_blocks=7)
        slot = tier.put(PAGE_A, page(1))
        assert slot is not None
        fake.data[BLOCK_BYTES] ^= 1
        assert not tier.get(slot, PAGE_A, empty())
        assert tier.quarantined_bytes == BLOCK_BYTES + PAGE
        tier.free(slot)
        assert tier.put(PAGE_B, page(2)) is not None
        assert tier.put(PAGE_B, page(2)) is None, "its blocks are not used again"
        assert not tier.get(slot, PAGE_A, empty())
        tier.check_integrity()


class TestErrors:
    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EINVAL])
    def test_a_failed_write_is_a_value_and_keeps_no_room(self, number: int) -> None:
        tier, fake = tier_on_fake()
        fake.write_errors.append(number)
        assert tier.put(PAGE_A, page(1)) is None
        assert tier.counters.put_errors == 1
        assert tier.free_bytes == tier.num_bytes
        assert tier.put(PAGE_A, page(1)) is not None

    def test_a_failed_read_is_a_value(self) -> None:
        tier, fake = tier_on_fake()
        slot = tier.put(PAGE_A, page(1))
        assert slot is not None
        fake.read_errors.append(errno.EIO)
        into = empty()
        assert not tier.get(slot, PAGE_A, into)
        assert bytes(into) == bytes(PAGE)
        assert tier.counters.get_errors == 1
        tier.check_integrity()

    def test_a_file_that_got_shorter_is_a_value(self) -> None:
        tier, fake = tier_on_fake()
        slot = tier.put(PAGE_A, page(1))
        assert slot is not None
        del fake.data[BLOCK_BYTES:]
        assert not tier.get(slot, PAGE_A, empty())
        assert tier.put(PAGE_B, page(2)) is None

    def test_calls_that_do_less_are_gone_on_with(self) -> None:
        tier, fake = tier_on_fake()
        fake.most_bytes = 1000
        slot = tier.put(PAGE_A, page(1))
        assert slot is not None
        into = empty()
        assert tier.get(slot, PAGE_A, into)
        assert into == page(1)

    def test_errors_in_a_row_end_writing_and_not_reading(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        tier, fake = tier_on_fake()
        slot = tier.put(PAGE_A, page(1))
        assert slot is not None
        fake.write_errors.extend([errno.EIO] * 3)
        with caplog.at_level(logging.INFO, "memd"):
            for _ in range(6):
                assert tier.put(PAGE_B, page(2)) is None
        assert tier.counters.put_errors == 3
        assert not tier.is_writable
        assert tier.is_readable
        assert tier.get(slot, PAGE_A, empty())
        assert len(caplog.records) == 1
        assert "3 errors in a row ([Errno 5] Input/output error)" in caplog.text

    def test_failed_reads_in_a_row_end_everything(self, caplog: pytest.LogCaptureFixture) -> None:
        tier, fake = tier_on_fake(num_blocks=15)
        slots = [tier.put(PageIdentity(1, i, 1), page(i)) for i in range(5)]
        fake.read_errors.extend([errno.EIO] * 2)
        fake.data[:] = bytes(len(fake.data))
        with caplog.at_level(logging.INFO, "memd"):
            for i, slot in enumerate(slots):
                assert slot is not None
                assert not tier.get(slot, PageIdentity(1, i, 1), empty())
        assert not tier.is_readable
        assert not tier.is_writable
        assert tier.counters.get_errors + tier.counters.corrupt == 3
        assert tier.counters.misses == 2
        assert tier.put(PAGE_B, page(2)) is None
        assert len(caplog.records) == 1
        assert "the disk tier is off after 3 failed reads" in caplog.text

    def test_failed_writes_with_successes_between_them_are_borne(self) -> None:
        tier, fake = tier_on_fake()
        for _ in range(5):
            fake.write_errors.extend([errno.EIO] * 2)
            assert tier.put(PAGE_A, page(1)) is None
            assert tier.put(PAGE_A, page(1)) is None
            slot = tier.put(PAGE_A, page(1))
            assert slot is not None
            tier.free(slot)
        assert tier.is_writable

    def test_failed_reads_with_successes_between_them_are_borne(self) -> None:
        tier, fake = tier_on_fake(num_blocks=3 * 7)
        slots = [tier.put(PageIdentity(1, i, 1), page(i)) for i in range(7)]
        for i, slot in enumerate(slots):
            assert slot is not None
            if i != 2:
                fake.read_errors.append(errno.EIO)
            assert tier.get(slot, PageIdentity(1, i, 1), empty()) == (i == 2)
            assert tier.is_readable == (i < 5)


def test_what_moved_is_counted() -> None:
    tier, _ = tier_on_fake()
    slot = tier.put(PAGE_A, page(1))
    assert slot is not None
    tier.get(slot, PAGE_A, empty())
    counters = tier.counters
    assert (counters.puts, counters.bytes_written) == (1, PAGE)
    assert (counters.gets, counters.bytes_read) == (1, PAGE)
    assert counters.put_ns >= counters.put_max_ns > 0
    assert counters.get_ns >= counters.get_max_ns > 0


def test_closing_closes_the_file() -> None:
    tier, fake = tier_on_fake()
    with tier:
        pass
    assert fake.is_closed


def test_a_slot_without_its_blocks_is_found_by_the_integrity_check() -> None:
    tier, _ = tier_on_fake()
    slot = tier.put(PAGE_A, page(1))
    assert slot is not None
    tier._blocks.free(slot.block)
    with pytest.raises(IntegrityError, match="differ"):
        tier.check_integrity()
