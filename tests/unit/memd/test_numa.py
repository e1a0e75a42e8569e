from __future__ import annotations

import mmap
import os
from typing import TYPE_CHECKING

import numpy as np
import pytest

from memd.errors import ConfigError
from memd.numa import Node, choose_nodes, is_policy, placement, read_nodes, running_cpu

if TYPE_CHECKING:
    from pathlib import Path

TWO = (Node(0, frozenset({0, 1})), Node(1, frozenset({2, 3})))


@pytest.fixture
def four_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})


def sysfs(tmp_path: Path, cpulists: dict[int, str], *, has_memory: str) -> Path:
    root = tmp_path / "node"
    root.mkdir()
    (root / "has_memory").write_text(has_memory + "\n")
    for node_id, cpulist in cpulists.items():
        (root / f"node{node_id}").mkdir()
        (root / f"node{node_id}" / "cpulist").write_text(cpulist + "\n")
    return root


def status(tmp_path: Path, allowed: str) -> Path:
    file = tmp_path / "status"
    file.write_text(f"Mems_allowed:\t0f\nMems_allowed_list:\t{allowed}\n")
    return file


@pytest.mark.parametrize("text", ["interleave", "local", "0", "0,2-3", "12-15"])
def test_policies_are_known(text: str) -> None:
    assert is_policy(text)


@pytest.mark.parametrize("text", ["", "all", "0,", "-1", "0;1", "0-", "1 2"])
def test_what_is_no_policy_is_not(text: str) -> None:
    assert not is_policy(text)


@pytest.mark.usefixtures("four_cpus")
def test_nodes_are_those_with_memory_and_processors(tmp_path: Path) -> None:
    root = sysfs(tmp_path, {0: "0-1", 1: "2,3", 2: "", 3: "4-7"}, has_memory="0-3")
    assert read_nodes(sysfs=root, status=status(tmp_path, "0-3")) == TWO


@pytest.mark.usefixtures("four_cpus")
def test_nodes_that_a_cpuset_forbids_are_left_out(tmp_path: Path) -> None:
    root = sysfs(tmp_path, {0: "0-1", 1: "2-3"}, has_memory="0-1")
    assert read_nodes(sysfs=root, status=status(tmp_path, "1")) == TWO[1:]


@pytest.mark.usefixtures("four_cpus")
def test_a_kernel_that_names_no_nodes_has_one(tmp_path: Path) -> None:
    found = read_nodes(sysfs=tmp_path / "none", status=tmp_path / "none")
    assert found == (Node(0, frozenset({0, 1, 2, 3})),)


def test_this_host_has_nodes() -> None:
    nodes = read_nodes()
    assert frozenset().union(*(node.cpus for node in nodes)) <= os.sched_getaffinity(0)
    assert running_cpu() in range(os.cpu_count() or 1)


@pytest.mark.parametrize(
    ("policy", "node_ids"), [("interleave", [0, 1]), ("local", [1]), ("0", [0]), ("0-1", [0, 1])]
)
def test_a_policy_chooses_nodes(policy: str, node_ids: list[int]) -> None:
    assert [node.node_id for node in choose_nodes(policy, TWO, own_cpu=2)] == node_ids


@pytest.mark.parametrize("policy", ["interleave", "local", "0"])
def test_one_node_is_no_choice(policy: str) -> None:
    assert choose_nodes(policy, TWO[:1], own_cpu=0) == ()


def test_a_node_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(ConfigError, match=r"--numa 0,4: .* on node 4; it can on 0, 1"):
        choose_nodes("0,4", TWO, own_cpu=0)


def test_placement_is_summed_over_the_pieces_of_a_mapping(tmp_path: Path) -> None:
    numa_maps = tmp_path / "numa_maps"
    numa_maps.write_text(
        "00001000 default file=/memfd:memd\\040(deleted) dirty=3 N0=1 N1=2 kernelpagesize_kB=4\n"
        "00004000 default file=/memfd:memd\\040(deleted) N1=1 kernelpagesize_kB=2048\n"
        "01000000 default heap anon=9 N0=9 kernelpagesize_kB=4\n"
    )
    found = placement(0x1000, 0x300000, numa_maps=numa_maps)
    assert found == {0: 4096, 1: 2 * 4096 + (2 << 20)}
    assert placement(0x1000, 1, numa_maps=tmp_path / "none") == {}


def test_memory_of_this_process_lies_somewhere() -> None:
    # Shared, as the region is: the kernel joins private neighbours to one mapping that may begin
    # before the first byte asked for.
    with mmap.mmap(-1, 8 << 20) as shared:
        memory = np.frombuffer(shared, dtype=np.uint8)
        memory[...] = 1
        placed = placement(memory.ctypes.data, memory.nbytes)
        del memory
    assert not placed or sum(placed.values()) >= 8 << 20
