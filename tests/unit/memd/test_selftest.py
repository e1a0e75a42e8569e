from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from memd.errors import MemdUnavailable
from memd.limits import Room
from memd.numa import Node
from memd.selftest import Finding, Verdict, host, look_at_host, measure, worst
from memd.selftest.host import (
    check_cuda,
    check_memlock,
    check_memory,
    check_numa,
    check_pidfd,
    check_populate,
    check_sockets,
    check_swap,
)

if TYPE_CHECKING:
    from pathlib import Path

GIB = 1 << 30
TWO_NODES = (Node(0, frozenset({0})), Node(1, frozenset({1})))


def test_a_pool_that_fits_is_ok() -> None:
    finding = check_memory(4 * GIB, Room(8 * GIB, "MemAvailable of this host"))
    assert finding.verdict is Verdict.OK
    assert finding.measured == {"largest_region_bytes": 8 * GIB}


def test_a_pool_that_does_not_fit_fails_with_the_limit_and_the_size_that_would() -> None:
    finding = check_memory(4 * GIB, Room(3 * GIB, "/sys/fs/cgroup/memory.max"))
    assert finding.verdict is Verdict.FAIL
    assert "/sys/fs/cgroup/memory.max has room for 3 GiB, not for 4 GiB" in finding.detail
    assert f"--bytes {3 * GIB}" in finding.remedy


@pytest.mark.parametrize(
    ("lockable", "lock", "verdict"),
    [
        (None, True, Verdict.OK),
        (8 * GIB, True, Verdict.OK),
        (8 << 20, False, Verdict.OK),
        (8 << 20, True, Verdict.FAIL),
    ],
)
def test_locking_matters_only_where_it_is_asked_for(
    lockable: int | None, lock: bool, verdict: Verdict
) -> None:
    finding = check_memlock(4 * GIB, lockable, lock=lock)
    assert finding.verdict is verdict
    assert (f"RLIMIT_MEMLOCK to {4 * GIB}" in finding.remedy) == (verdict is Verdict.FAIL)


@pytest.mark.parametrize(
    ("swap_bytes", "lock", "verdict"),
    [(0, False, Verdict.OK), (GIB, True, Verdict.OK), (GIB, False, Verdict.WARN)],
)
def test_swap_is_a_warning_unless_the_pool_is_locked(
    swap_bytes: int, lock: bool, verdict: Verdict
) -> None:
    assert check_swap(swap_bytes, lock=lock).verdict is verdict


@pytest.mark.parametrize(
    ("policy", "verdict", "detail"),
    [
        ("interleave", Verdict.OK, "takes 0, 1"),
        ("local", Verdict.OK, "takes 1"),
        ("7", Verdict.FAIL, "on node 7"),
    ],
)
def test_nodes_that_would_be_used_are_named(policy: str, verdict: Verdict, detail: str) -> None:
    finding = check_numa(policy, TWO_NODES, own_cpu=1)
    assert finding.verdict is verdict
    assert detail in finding.detail


def test_one_node_is_nothing_to_choose() -> None:
    assert "nothing to choose" in check_numa("interleave", TWO_NODES[:1], own_cpu=0).detail


@pytest.mark.parametrize("check", [check_pidfd, check_populate])
def test_what_memd_can_do_without_is_a_warning_with_a_remedy(check: object) -> None:
    assert callable(check)
    assert check(True).verdict is Verdict.OK
    missing = check(False)
    assert missing.verdict is Verdict.WARN
    assert "Linux 5." in missing.remedy


@pytest.mark.parametrize(
    ("has_library", "has_device", "verdict"),
    [
        (True, True, Verdict.OK),
        (False, False, Verdict.OK),
        (False, True, Verdict.WARN),
        (True, False, Verdict.WARN),
    ],
)
def test_half_a_cuda_driver_is_a_warning(
    has_library: bool, has_device: bool, verdict: Verdict
) -> None:
    finding = check_cuda(has_library=has_library, has_device=has_device)
    assert finding.verdict is verdict
    assert bool(finding.remedy) == (verdict is Verdict.WARN)


def test_sockets_are_tried_and_leave_nothing(tmp_path: Path) -> None:
    assert check_sockets(tmp_path).verdict is Verdict.OK
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["missing", "x" * 100])
def test_a_directory_that_takes_no_socket_fails(name: str, tmp_path: Path) -> None:
    directory = tmp_path / name
    if name != "missing":
        directory.mkdir()
    finding = check_sockets(directory)
    assert finding.verdict is Verdict.FAIL
    assert "--address" in finding.remedy


def test_a_kernel_without_descriptor_passing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host.socket, "recv_fds", lambda *_: (b"\0", [], 0, None))
    assert check_sockets(tmp_path).verdict is Verdict.FAIL


def test_a_host_is_looked_at_all_over() -> None:
    findings = look_at_host(1 << 20, numa="interleave", lock=False)
    names = [finding.name for finding in findings]
    assert names == [
        "memory",
        "memlock",
        "swap",
        "numa",
        "populate",
        "pidfd",
        "sockets",
        "cuda",
    ]


def test_speeds_are_measured() -> None:
    for finding in (measure.measure_memcpy(8 << 20), measure.measure_pretouch(num_bytes=64 << 20)):
        assert finding.measured[f"{finding.name}_gib_per_s"] > 0


def test_a_disk_is_measured_and_left_as_it_was(tmp_path: Path) -> None:
    finding = measure.measure_disk(tmp_path, 8 << 20)
    assert finding.verdict in (Verdict.OK, Verdict.WARN)
    assert finding.measured["read_gib_per_s"] > 0
    assert finding.measured["write_gib_per_s"] > 0
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_not_there_fails(tmp_path: Path) -> None:
    finding = measure.measure_disk(tmp_path / "none", 8 << 20)
    assert finding.verdict is Verdict.FAIL
    assert "none" in finding.detail


def test_a_disk_that_returns_something_else_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memd.tiers.disk.GetJob.run", lambda self: None)
    assert measure.measure_disk(tmp_path, 8 << 20).verdict is Verdict.FAIL


def test_a_slow_host_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_SLOW_GIB_PER_S", 1e9)
    finding = measure.measure_memcpy(1 << 20)
    assert finding.verdict is Verdict.WARN
    assert finding.remedy


def test_a_region_that_cannot_be_made_fails_and_does_not_raise() -> None:
    assert measure.measure_pretouch(num_bytes=1 << 50).verdict is Verdict.FAIL


def test_a_daemon_that_does_not_start_fails_with_its_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def spawn(**options: object) -> None:
        raise MemdUnavailable("no room on this host")

    monkeypatch.setattr(measure, "spawn_memd", spawn)
    (finding,) = measure.try_daemon()
    assert finding.verdict is Verdict.FAIL
    assert finding.detail == "no room on this host"


@pytest.mark.parametrize(
    ("verdicts", "verdict"),
    [([], "ok"), (["ok", "ok"], "ok"), (["ok", "warn"], "warn"), (["fail", "warn"], "fail")],
)
def test_the_worst_finding_decides(verdicts: list[str], verdict: str) -> None:
    findings = [Finding("x", Verdict(each), "") for each in verdicts]
    assert worst(findings) == verdict
