from __future__ import annotations

import threading
import time

import pytest

from memd.tiers.runner import ThreadRunner, run_at_once


class Note:
    """A job that says where and when it ran."""

    def __init__(self, gate: threading.Event | None = None) -> None:
        self.gate = gate
        self.thread = ""

    def run(self) -> None:
        if self.gate is not None:
            assert self.gate.wait(10)
        self.thread = threading.current_thread().name


class Broken:
    def run(self) -> None:
        raise RuntimeError("a bug")


def test_jobs_run_in_their_order_on_another_thread_and_say_so() -> None:
    told = threading.Semaphore(0)
    gate = threading.Event()
    with ThreadRunner(told.release) as run:
        jobs = [Note(gate), Note()]
        runs = [run(job) for job in jobs]
        assert not any(running.is_done for running in runs), "the first one holds the others up"
        gate.set()
        for _ in runs:
            assert told.acquire(timeout=10)
        assert all(running.is_done for running in runs)
        assert {job.thread for job in jobs} == {"memd-disk"}
    assert "memd-disk" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize("on_thread", [False, True])
def test_an_error_that_nobody_expected_ends_the_job_only(
    on_thread: bool, caplog: pytest.LogCaptureFixture
) -> None:
    told = threading.Semaphore(0)
    with ThreadRunner(told.release) as run:
        runs = [(run if on_thread else run_at_once)(job) for job in (Broken(), Note())]
        if on_thread:
            assert told.acquire(timeout=10)
            assert told.acquire(timeout=10)
    assert all(running.is_done for running in runs)
    assert "moving a page failed" in caplog.text


def test_a_disk_that_does_not_answer_keeps_nobody_from_ending(
    caplog: pytest.LogCaptureFixture,
) -> None:
    gate = threading.Event()
    runner = ThreadRunner(lambda: None, end_wait_s=0.01).__enter__()
    running = runner(Note(gate))
    begin = time.monotonic()
    assert not runner.close()
    assert time.monotonic() - begin < 5
    assert not running.is_done
    assert "the disk did not answer" in caplog.text
    gate.set()
    runner._end_wait_s = 20.0  # it answers now, as soon as the machine lets it
    assert runner.close()
