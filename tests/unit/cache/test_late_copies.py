"""What happens to staging, pages and landing rows between a copy's begin and its end."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from tests.held_transfers import HeldTransfers
from tests.property.cache import test_runtime as eager

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def machine() -> Iterator[eager.Machine]:
    """Pivots that drift at nearly every check, copies that are done when the test says so."""
    machine = eager.Machine()
    machine.transfers = HeldTransfers()
    machine.start(retrieval="async", variant=("budget", "model", 1), seed=7)
    machine.transfers.is_held = True
    yield machine
    machine.transfers.is_held = False
    machine.teardown()


def test_staging_is_the_prompts_until_it_has_left(machine: eager.Machine) -> None:
    extents = machine.runtime.staging.extents
    machine.admit(prompt_len=40, chunk=40)
    machine.admit(prompt_len=30, chunk=30)
    assert extents.used == 70
    machine.pools_agree()
    machine.transfers.do_next()
    machine.runtime.poll()
    assert extents.used == 30
    # The first one's room is given to a third one, whose copy comes last.
    machine.admit(prompt_len=40, chunk=40)
    machine.transfers.is_held = False
    machine.runtime.poll()
    assert extents.used == 0
    for row in machine.live:
        assert machine.has_its_rows_in_memd(row)


def test_pages_are_the_prompts_until_they_are_written(machine: eager.Machine) -> None:
    machine.admit(prompt_len=40, chunk=40)
    pages = machine.store.num_pages_used
    assert pages > 0
    machine.end(which=0)
    machine.pools_agree()
    assert machine.store.num_pages_used == pages
    # The next request has the same row, and token ids in the same pages.
    machine.admit(prompt_len=40, chunk=40)
    machine.pools_agree()
    machine.transfers.is_held = False
    machine.runtime.poll()
    assert machine.has_its_rows_in_memd(1)
    machine.end(which=0)
    machine.runtime.poll()
    assert machine.store.num_pages_used == 0


def test_prompts_that_share_pages_leave_each_others_rows_alone(machine: eager.Machine) -> None:
    # Token ids are taken from both ends: every prompt has pages in common with the one before.
    for length in (13, 22, 9, 30):
        machine.admit(prompt_len=length, chunk=length)
    machine.transfers.is_held = False
    machine.runtime.poll()
    shared = machine.store._references > 1
    assert shared.any()
    for row in machine.live:
        assert machine.has_its_rows_in_memd(row)


def test_nothing_is_fetched_before_it_is_stored(machine: eager.Machine) -> None:
    counters = machine.runtime._retrieval.counters
    machine.admit(prompt_len=40, chunk=40)
    machine.decode(steps=5)
    assert machine.runtime.drift.events > 0
    assert counters.issued == 0
    machine.transfers.is_held = False
    machine.decode(steps=5)
    assert counters.issued > 0
    assert counters.installed_rows > 0


def test_landing_rows_are_in_use_until_the_device_has_them(machine: eager.Machine) -> None:
    counters, memd = machine.runtime._retrieval.counters, machine.memd
    machine.transfers.is_held = False
    machine.admit(prompt_len=40, chunk=40)
    machine.decode(steps=2)
    machine.transfers.is_held = True
    machine.decode(steps=3)
    issued = counters.issued
    assert issued > 0
    assert machine.transfers.num_waiting > 0
    assert counters.installed_rows == 0
    in_use = memd.landing_rows_used
    assert in_use > 0
    # Its request ends; the rows stay in use, and nobody gets them.
    machine.end(which=0)
    machine.admit(prompt_len=9, chunk=9)
    machine.decode(steps=1)
    assert memd.landing_rows_used == in_use
    machine.transfers.is_held = False
    machine.decode(steps=1)
    assert memd.landing_rows_used == 0
    assert counters.dropped == counters.issued == issued
    assert counters.installed_rows == 0


def test_a_full_landing_ring_is_not_asked_again_before_something_has_landed(
    machine: eager.Machine,
) -> None:
    counters, memd = machine.runtime._retrieval.counters, machine.memd
    machine.transfers.is_held = False
    machine.admit(prompt_len=40, chunk=40)
    machine.decode(steps=1)
    machine.admit(prompt_len=40, chunk=40)
    machine.runtime.poll()
    memd.hold()
    # The first one drifts a step before the second, which finds the ring full.
    while counters.issued == 0:
        machine.decode(steps=1)
    other = memd.fetch(np.zeros(48 - memd.landing_rows_used, dtype=np.int64))
    machine.decode(steps=5)
    assert counters.issued == 1
    assert memd.stats()["counters"]["fetches_refused_ring_full"] == 1
    memd.resume()
    memd.finish(other)
    machine.decode(steps=3)
    assert counters.issued > 1
    assert counters.installed > 1
    assert memd.stats()["counters"]["fetches_refused_ring_full"] == 1


def test_a_dead_memd_leaves_no_staging_behind(machine: eager.Machine) -> None:
    machine.admit(prompt_len=40, chunk=40)
    machine.memd.kill()
    machine.decode(steps=2)
    assert machine.runtime.staging.extents.used == 40
    machine.transfers.is_held = False
    machine.decode(steps=1)
    assert machine.runtime.staging.extents.used == 0
    machine.pools_agree()


def test_sync_retrieval_waits_for_copies() -> None:
    machine = eager.Machine()
    machine.transfers = HeldTransfers()
    machine.start(retrieval="sync", variant=("budget", "model", 1), seed=7)
    machine.transfers.is_held = True
    machine.admit(prompt_len=40, chunk=40)
    machine.decode(steps=3)
    state = machine.runtime.state()
    assert state["rows_installed"] > 0
    assert machine.transfers.num_waiting == 0
    machine.teardown()
