from __future__ import annotations

import datetime
import io
import json
import logging
import os
import sys
import threading

import pytest

from memd.logs import configure_logs


def lines(log_format: str, level: str = "info") -> tuple[io.StringIO, logging.Logger]:
    stream = io.StringIO()
    configure_logs(level, log_format, stream=stream)
    return stream, logging.getLogger("memd.test")


def test_json_is_one_object_a_line_with_the_records_fields() -> None:
    stream, log = lines("json")
    log.info("client %d\nsaid %r", 3, "hello", extra={"client_id": 3, "client_pid": 77})
    (line,) = stream.getvalue().splitlines()
    entry = json.loads(line)
    time = datetime.datetime.fromisoformat(entry.pop("time"))
    assert abs(datetime.datetime.now(datetime.UTC) - time) < datetime.timedelta(minutes=1)
    assert entry == {
        "level": "info",
        "logger": "memd.test",
        "message": "client 3\nsaid 'hello'",
        "pid": os.getpid(),
        "client_id": 3,
        "client_pid": 77,
    }


def test_json_holds_the_traceback_of_an_error() -> None:
    stream, log = lines("json")
    try:
        raise RuntimeError("broken")
    except RuntimeError:
        log.exception("it failed")
    (line,) = stream.getvalue().splitlines()
    entry = json.loads(line)
    assert entry["level"] == "error"
    assert entry["error"].endswith("RuntimeError: broken")


def test_what_nobody_catches_is_json_too() -> None:
    stream, _ = lines("json")
    with pytest.raises(RuntimeError) as main:
        raise RuntimeError("broken")
    sys.excepthook(RuntimeError, main.value, None)

    def fail() -> None:
        raise ValueError("broken as well")

    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    entries = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [entry["message"] for entry in entries] == [
        "uncaught RuntimeError",
        "uncaught ValueError",
    ]
    assert entries[1]["error"].endswith("ValueError: broken as well")


def test_json_takes_any_field() -> None:
    stream, log = lines("json")
    log.info("placed", extra={"node_bytes": {0: 1}, "path": os.path})
    entry = json.loads(stream.getvalue())
    assert entry["node_bytes"] == {"0": 1}
    assert "posixpath" in entry["path"]


def test_text_is_a_line_for_people() -> None:
    stream, log = lines("text")
    log.warning("client %d is gone", 3, extra={"client_id": 3})
    assert f"memd[{os.getpid()}] WARNING client 3 is gone\n" in stream.getvalue()


def test_the_level_is_kept() -> None:
    stream, log = lines("json", level="warning")
    log.info("not shown")
    log.warning("shown")
    assert stream.getvalue().count("\n") == 1
