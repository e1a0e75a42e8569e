"""Which pages leave host memory first: policies by name, behind one Protocol.

A policy orders; who may leave at all is decided by ``TieredPages``, which *offers* pages and
*withdraws* them, and only what is offered is ever chosen.

All of them are one queue with another first key: the page with the lowest ``(rank, last use)``
goes first. Using pages sets some array elements and nothing else, because that is what every fetch
does; the heap learns of it when a page comes to its top with a key that has grown meanwhile, and
puts it back. So a choice costs O(log n), amortized over the uses before it, and it is right because
keys only grow while a page is in the heap.

How to add one: a subclass of ``_Ranked`` that sets ``_ranks``, a line in ``_POLICIES``, a case in
``tests/property/memd/test_tiers_machine.py``.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, Protocol

import numpy as np

from memd.errors import ConfigError, IntegrityError

if TYPE_CHECKING:
    import numpy.typing as npt

    PageIds = npt.NDArray[np.int64]

__all__ = [
    "POLICY_NAMES",
    "DepthFirst",
    "EvictionPolicy",
    "LeastFrequentlyUsed",
    "LeastRecentlyUsed",
    "eviction_policy",
]


class EvictionPolicy(Protocol):
    """Orders a client's pages. Ids are int64 [num_ids], each once and in range."""

    def admit(self, page_ids: PageIds, depths: PageIds) -> None:
        """Begin the pages' history anew, with a first use; none of them is offered now.

        Args:
            page_ids: Pages with a new content.
            depths: How deep in a prompt each lies, int64 [num_ids]; the first page has depth 0.
        """
        ...

    def touch(self, page_ids: PageIds) -> None:
        """Note that pages are used now, whether they are offered or not."""
        ...

    def offer(self, page_ids: PageIds) -> None:
        """Let pages be chosen; they were admitted before."""
        ...

    def withdraw(self, page_ids: PageIds) -> None:
        """Let pages not be chosen any more; what is known of them stays."""
        ...

    def evict(self, page_id: int) -> None:
        """Withdraw a page because it has left, from which a policy may learn."""
        ...

    def victims(self, max_pages: int) -> list[int]:
        """The pages on offer that should leave first, best first; changes nothing."""
        ...

    def check_integrity(self) -> None:
        """Verify that every page on offer will be found.

        Raises:
            IntegrityError: One will not.
        """
        ...


class _Ranked:
    """The queue of all policies; alone it is the one by last use.

    Args:
        num_pages: Pages of the client.
    """

    def __init__(self, num_pages: int) -> None:
        self._ranks = np.zeros(num_pages, dtype=np.int64)
        self._used = np.zeros(num_pages, dtype=np.int64)
        self._is_offered = np.zeros(num_pages, dtype=np.bool_)
        self._time = 0
        # (rank, last use, page, number): no larger than the page's key is now. An entry whose
        # number is not the page's has been replaced.
        self._heap: list[tuple[int, int, int, int]] = []
        self._entries = np.zeros(num_pages, dtype=np.int64)
        self._next_entry = 1

    def admit(self, page_ids: PageIds, depths: PageIds) -> None:
        """Begin anew; see ``EvictionPolicy.admit``."""
        del depths
        self._is_offered[page_ids] = False
        # Keys may get smaller here: what stands in the heap would come too late.
        self._entries[page_ids] = 0
        self._use(page_ids)

    def touch(self, page_ids: PageIds) -> None:
        """Note a use; see ``EvictionPolicy.touch``."""
        self._use(page_ids)

    def offer(self, page_ids: PageIds) -> None:
        """Let pages be chosen; see ``EvictionPolicy.offer``."""
        self._is_offered[page_ids] = True
        for page_id in page_ids[self._entries[page_ids] == 0].tolist():
            self._push(page_id)

    def withdraw(self, page_ids: PageIds) -> None:
        """Let pages not be chosen; see ``EvictionPolicy.withdraw``."""
        # Their entries stay, so that pages which are pinned and unpinned cost the heap nothing.
        self._is_offered[page_ids] = False

    def evict(self, page_id: int) -> None:
        """Withdraw a page; see ``EvictionPolicy.evict``."""
        self._is_offered[page_id] = False

    def victims(self, max_pages: int) -> list[int]:
        """The first to go; see ``EvictionPolicy.victims``."""
        chosen: list[tuple[int, int, int, int]] = []
        while self._heap and len(chosen) < max_pages:
            entry = heapq.heappop(self._heap)
            _, _, page_id, number = entry
            if number != self._entries[page_id]:
                continue
            if not self._is_offered[page_id]:
                self._entries[page_id] = 0
            elif entry[:2] != self._key(page_id):
                self._push(page_id)
            else:
                chosen.append(entry)
        for entry in chosen:
            heapq.heappush(self._heap, entry)
        return [page_id for _, _, page_id, _ in chosen]

    def check_integrity(self) -> None:
        """Verify the heap; see ``EvictionPolicy.check_integrity``."""
        valid = [entry for entry in self._heap if entry[3] == self._entries[entry[2]]]
        found = {page_id for _, _, page_id, _ in valid}
        if len(found) != len(valid):
            raise IntegrityError("a page stands twice in the eviction queue")
        if missing := set(np.flatnonzero(self._is_offered).tolist()) - found:
            raise IntegrityError(f"page {min(missing)} is offered and not in the eviction queue")
        for entry in valid:
            if entry[:2] > self._key(entry[2]):
                raise IntegrityError(f"page {entry[2]} stands too late in the eviction queue")

    def _use(self, page_ids: PageIds) -> None:
        self._time += 1
        self._used[page_ids] = self._time

    def _key(self, page_id: int) -> tuple[int, int]:
        return int(self._ranks[page_id]), int(self._used[page_id])

    def _push(self, page_id: int) -> None:
        if len(self._heap) > 2 * len(self._entries):
            # Replaced entries are found at the top only, and not all of them come there.
            self._heap = [entry for entry in self._heap if entry[3] == self._entries[entry[2]]]
            heapq.heapify(self._heap)
        self._entries[page_id] = self._next_entry
        heapq.heappush(self._heap, (*self._key(page_id), page_id, self._next_entry))
        self._next_entry += 1


class LeastRecentlyUsed(_Ranked):
    """The page that was not used for the longest time goes first."""


class LeastFrequentlyUsed(_Ranked):
    """The page that was used least goes first, ties by last use; and uses are forgotten in time.

    A page's rank is its uses plus the age of the queue, which is the rank of the last page that
    left. So a page that was used a hundred times stays until the others have been through a hundred
    ranks, and not for ever.

    Source: M. Arlitt and others, Evaluating Content Management Techniques for Web Proxy Caches
    (2000), LFU with dynamic aging. Deliberate difference: a page that comes back from disk brings
    its uses with it.
    """

    def __init__(self, num_pages: int) -> None:
        super().__init__(num_pages)
        self._uses = np.zeros(num_pages, dtype=np.int64)
        self._age = 0

    def admit(self, page_ids: PageIds, depths: PageIds) -> None:
        """Begin anew; see ``EvictionPolicy.admit``."""
        self._uses[page_ids] = 0
        super().admit(page_ids, depths)

    def evict(self, page_id: int) -> None:
        """Withdraw a page, and age; see ``EvictionPolicy.evict``."""
        super().evict(page_id)
        self._age = max(self._age, int(self._ranks[page_id]))

    def _use(self, page_ids: PageIds) -> None:
        super()._use(page_ids)
        self._uses[page_ids] += 1
        self._ranks[page_ids] = self._uses[page_ids] + self._age


class DepthFirst(_Ranked):
    """The page that lies deepest in its prompt goes first, ties by last use.

    The beginning of a prompt is what other prompts share, and no page of it is of use without those
    before.
    """

    def admit(self, page_ids: PageIds, depths: PageIds) -> None:
        """Begin anew; see ``EvictionPolicy.admit``."""
        self._ranks[page_ids] = -depths
        super().admit(page_ids, depths)


_POLICIES: dict[str, type[_Ranked]] = {
    "depth": DepthFirst,
    "lfu": LeastFrequentlyUsed,
    "lru": LeastRecentlyUsed,
}

POLICY_NAMES = tuple(_POLICIES)
"""What ``eviction_policy`` knows."""


def eviction_policy(name: str, num_pages: int) -> EvictionPolicy:
    """A new policy.

    Args:
        name: One of ``POLICY_NAMES``.
        num_pages: Pages of the client.

    Raises:
        ConfigError: No policy has that name.
    """
    try:
        policy = _POLICIES[name]
    except KeyError:
        known = ", ".join(POLICY_NAMES)
        raise ConfigError(f"--eviction must be one of {known}, got {name}") from None
    return policy(num_pages)
