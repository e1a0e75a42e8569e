from __future__ import annotations

import numpy as np
import pytest

from memd.errors import ConfigError, IntegrityError
from memd.tiers.eviction import POLICY_NAMES, EvictionPolicy, eviction_policy


def ids(*page_ids: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.array(page_ids, dtype=np.int64)


def offered(name: str, depths: list[int]) -> EvictionPolicy:
    """A policy with a page for each depth, admitted one after the other, all on offer."""
    policy = eviction_policy(name, len(depths))
    for page_id, depth in enumerate(depths):
        policy.admit(ids(page_id), ids(depth))
        policy.offer(ids(page_id))
    return policy


@pytest.mark.parametrize("name", POLICY_NAMES)
class TestEveryPolicy:
    def test_the_oldest_goes_first_where_nothing_else_counts(self, name: str) -> None:
        assert offered(name, [0] * 5).victims(3) == [0, 1, 2]

    def test_nothing_is_chosen_that_is_not_offered(self, name: str) -> None:
        policy = offered(name, [0] * 4)
        policy.withdraw(ids(0, 2))
        assert policy.victims(4) == [1, 3]
        policy.admit(ids(1), ids(0))
        assert policy.victims(4) == [3]

    def test_choosing_changes_nothing(self, name: str) -> None:
        policy = offered(name, [2, 0, 1])
        assert policy.victims(3) == policy.victims(3)
        assert policy.victims(0) == []

    def test_a_page_that_left_is_chosen_again_only_when_offered_again(self, name: str) -> None:
        policy = offered(name, [0] * 3)
        policy.evict(0)
        assert policy.victims(3) == [1, 2]
        policy.touch(ids(0))
        policy.offer(ids(0))
        assert sorted(policy.victims(3)) == [0, 1, 2]

    def test_a_use_counts_also_while_a_page_is_withdrawn(self, name: str) -> None:
        policy = offered(name, [0] * 3)
        policy.withdraw(ids(0, 1))
        policy.touch(ids(0))
        policy.offer(ids(0, 1))
        assert policy.victims(3) == [1, 2, 0]

    def test_the_queue_does_not_grow_with_the_lives_of_pages(self, name: str) -> None:
        rng = np.random.default_rng(0)
        policy = eviction_policy(name, 50)
        policy.admit(np.arange(50), np.zeros(50, dtype=np.int64))
        policy.offer(np.arange(50))
        for page_id, depth in rng.integers(0, 50, (2000, 2)):
            policy.touch(rng.choice(50, 5, replace=False))
            policy.admit(ids(page_id), ids(depth))
            policy.offer(ids(page_id))
            # Looking at the top puts the queue in order, as it is when room is made now and then.
            policy.victims(int(depth) % 3)
            assert len(policy._heap) <= 101  # type: ignore[attr-defined]
        policy.check_integrity()
        assert policy.victims(50) == sorted(range(50), key=policy._key)  # type: ignore[attr-defined]

    def test_a_page_that_would_not_be_found_fails_the_integrity_check(self, name: str) -> None:
        policy = offered(name, [0] * 2)
        policy._heap.clear()  # type: ignore[attr-defined]
        with pytest.raises(IntegrityError, match="page 0 is offered"):
            policy.check_integrity()


def test_lru_keeps_what_was_used_last() -> None:
    policy = offered("lru", [5, 0, 9])
    policy.touch(ids(0))
    policy.touch(ids(2))
    assert policy.victims(3) == [1, 0, 2]


class TestLFU:
    def test_what_was_used_more_stays_longer(self) -> None:
        policy = offered("lfu", [0] * 3)
        for page_id, uses in ((0, 3), (1, 1), (2, 2)):
            for _ in range(uses):
                policy.touch(ids(page_id))
        assert policy.victims(3) == [1, 2, 0]

    def test_old_fame_does_not_last_for_ever(self) -> None:
        policy = offered("lfu", [0] * 3)
        for _ in range(5):
            policy.touch(ids(0))
        left = []
        for _ in range(6):
            # The others come, are used twice, and one leaves.
            for page_id in (1, 2):
                policy.admit(ids(page_id), ids(0))
                policy.touch(ids(page_id))
                policy.offer(ids(page_id))
            left += policy.victims(1)
            policy.evict(left[-1])
        assert left == [1, 1, 0, 1, 1, 1]


class TestDepth:
    def test_the_deepest_goes_first_however_lately_it_was_used(self) -> None:
        policy = offered("depth", [0, 2, 1, 2])
        policy.touch(ids(1))
        assert policy.victims(4) == [3, 1, 2, 0]

    def test_a_page_that_begins_anew_has_its_new_depth(self) -> None:
        policy = offered("depth", [0, 1, 2])
        policy.admit(ids(0), ids(3))
        policy.offer(ids(0))
        policy.admit(ids(2), ids(0))
        policy.offer(ids(2))
        assert policy.victims(3) == [0, 1, 2]


def test_an_unknown_policy_is_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match="--eviction must be one of depth, lfu, lru, got fifo"):
        eviction_policy("fifo", 4)
