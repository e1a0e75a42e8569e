"""Finds the daemons of this user and asks them for their stats."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memd.channel import ask_once
from memd.config import runtime_directory
from memd.endpoint import Endpoint, lock_holder
from memd.errors import MemdUnavailable
from memd.lifecycle import DaemonState
from memd.protocol import Stats, StatsReply, decode_reply, encode

if TYPE_CHECKING:
    import argparse

__all__ = ["add_address_option", "ask_all", "has_answered", "nobody_there"]

_TIMEOUT_S = 2.0


def add_address_option(parser: argparse.ArgumentParser) -> None:
    """Declare ``--address``, without which a command speaks to all daemons of this user."""
    parser.add_argument(
        "--address", metavar="ipc://PATH", help="which daemon (default: all of this user)"
    )


def ask_all(address: str | None) -> list[dict[str, Any]]:
    """Stats of one daemon, or of all that this user runs; those that do not answer are left out.

    Keys are listed in ``memd.metrics``; of a daemon that is starting only ``daemon`` is known.

    Raises:
        ConfigError: The address is none.
    """
    if address is not None:
        endpoints = [Endpoint.parse(address)]
    else:
        locks = runtime_directory().glob("memd-*/control.sock.lock")
        endpoints = [Endpoint(path.with_name("control.sock")) for path in sorted(locks)]
    return [stats for endpoint in endpoints if (stats := _ask(endpoint)) is not None]


def has_answered(stats: dict[str, Any]) -> bool:
    """Whether these are a daemon's own words, and not only that it is starting."""
    return "region" in stats


def nobody_there(address: str | None) -> str:
    """What to tell a user whose daemon is not there."""
    where = address or f"any address under {runtime_directory()}"
    return f"nobody serves {where}; start one with `memd serve --bytes 4GiB`"


def _ask(endpoint: Endpoint) -> dict[str, Any] | None:
    try:
        reply = decode_reply(ask_once(endpoint, encode(Stats(request_id=0)), timeout_s=_TIMEOUT_S))
    except MemdUnavailable:
        pid = lock_holder(endpoint)
        # It listens last of all; one that listens and does not answer is not starting.
        if pid is None or endpoint.attach.exists():
            return None
        daemon = {"pid": pid, "address": endpoint.address, "state": DaemonState.STARTING}
        return {"daemon": daemon}
    return reply.stats if isinstance(reply, StatsReply) else None
