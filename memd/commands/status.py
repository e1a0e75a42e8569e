"""``memd status``: show running daemons, their memory, clients and counters."""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Any

from memd.commands.command import EXIT_OK, EXIT_UNAVAILABLE, Command
from memd.commands.daemons import add_address_option, ask_all, has_answered, nobody_there
from memd.sizes import format_bytes

if TYPE_CHECKING:
    import argparse

__all__ = ["STATUS"]

_EPILOG = """\
examples:
  memd status                       every daemon of this user, those started by engines included
  memd status --address ipc://...   one daemon
  memd status --json | jq .         for programs; the keys are documented in memd/metrics.py
  memd status --wait 30             wait up to 30 s for a daemon to come up

exit status: 0 at least one daemon answered, 3 none did (or all of them are still starting)
"""


def _add_options(parser: argparse.ArgumentParser) -> None:
    add_address_option(parser)
    parser.add_argument("--json", action="store_true", help="print JSON, a list with one map each")
    parser.add_argument(
        "--wait",
        type=float,
        default=0.0,
        metavar="S",
        help="seconds to wait for a daemon to come up (default: do not wait)",
    )


def _run(arguments: argparse.Namespace) -> int:
    deadline = time.monotonic() + arguments.wait
    while True:
        found = ask_all(arguments.address)
        is_up = any(has_answered(stats) for stats in found)
        if is_up or time.monotonic() >= deadline:
            break
        time.sleep(0.05)
    if not found:
        sys.stderr.write(f"memd: {nobody_there(arguments.address)}\n")
        return EXIT_UNAVAILABLE
    if arguments.json:
        sys.stdout.write(json.dumps([_without_buckets(stats) for stats in found], indent=2) + "\n")
    else:
        sys.stdout.write("\n".join(_describe(stats) for stats in found))
    return EXIT_OK if is_up else EXIT_UNAVAILABLE


def _without_buckets(stats: dict[str, Any]) -> dict[str, Any]:
    """Stats without the one part that is too long to be read."""
    for latency in stats.get("latencies", {}).values():
        del latency["buckets"]
    return stats


def _describe(stats: dict[str, Any]) -> str:
    """Stats for people."""
    daemon = stats["daemon"]
    if not has_answered(stats):
        return f"memd {daemon['pid']} at {daemon['address']} is starting\n"
    region, counters = stats["region"], stats["counters"]
    used = region["bytes"] - region["free_bytes"]
    lines = [
        f"memd {daemon['pid']} at {daemon['address']}, {daemon.get('state', 'serving')}, "
        f"up {daemon['uptime_s']:.0f} s, integrity {stats['integrity']}",
        f"  region    {format_bytes(used)} of {format_bytes(region['bytes'])} given to clients, "
        f"{format_bytes(region['dirty_bytes'])} to be zeroed",
        f"  fetches   {counters['fetches']}, {counters['rows_fetched']} rows, "
        f"{format_bytes(counters['bytes_fetched'])}{_gather_speed(counters)}",
        *(_describe_latency(tag, latency) for tag, latency in stats.get("latencies", {}).items()),
        f"  clients   {len(stats['clients'])} now, {counters['clients_registered']} in all, "
        f"{counters['clients_reclaimed']} reclaimed after their end",
        f"  refused   {sum(stats['errors'].values())} requests, "
        f"{counters['peers_refused']} processes",
    ]
    for client in stats["clients"]:
        held = client["pages"] - client["pages_free"]
        lines.append(
            f"  client {client['client_id']}  pid {client['pid']}  {client['name'] or '-'}: "
            f"{held} of {client['pages']} pages ({format_bytes(held * client['page_bytes'])}), "
            f"{client['landing_rows']} landing rows"
        )
    return "\n".join(lines) + "\n"


def _gather_speed(counters: dict[str, Any]) -> str:
    if not counters["gather_ns"]:
        return ""
    gib_per_s = counters["bytes_fetched"] / counters["gather_ns"] * 1e9 / (1 << 30)
    return f" at {gib_per_s:.2f} GiB/s while gathering"


def _describe_latency(tag: str, latency: dict[str, Any]) -> str:
    percentiles = (f"{key[:3]} {latency[key] * 1e6:.0f}" for key in ("p50_s", "p90_s", "p99_s"))
    return f"  {tag:<9} {latency['count']}, {', '.join(percentiles)} us"


STATUS = Command(
    name="status",
    summary="show running daemons: memory, clients, counters",
    epilog=_EPILOG,
    add_options=_add_options,
    run=_run,
)
