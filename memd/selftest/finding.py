"""What a check says."""

from __future__ import annotations

import dataclasses
import enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["Finding", "Verdict", "worst"]


class Verdict(enum.StrEnum):
    """How good it is."""

    OK = "ok"
    WARN = "warn"
    """memd runs, but slower or with less comfort."""
    FAIL = "fail"
    """memd does not run as asked."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: One word for it.
        verdict: How good it is.
        detail: What was found.
        remedy: What to do about it; empty if nothing needs doing.
        measured: Numbers for programs, units in their names.
    """

    name: str
    verdict: Verdict
    detail: str
    remedy: str = ""
    measured: Mapping[str, float] = dataclasses.field(default_factory=dict)


def worst(findings: Iterable[Finding]) -> Verdict:
    """The worst verdict of all; ok for none."""
    verdicts = {finding.verdict for finding in findings}
    return max(verdicts, key=list(Verdict).index, default=Verdict.OK)
