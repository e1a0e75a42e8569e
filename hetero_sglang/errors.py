"""Every error that this package raises for a reason the user or operator can act on.

```
HeteroError
├── ConfigError      a flag, file or environment that cannot work; the message names the remedy
├── ProfileError     a head profile that is malformed or belongs to another model
├── BudgetError      a resident share that the profile's floor does not leave room for
└── ResidencyError   rows of a request are not where the bookkeeping says they are
```

The store in the other process has its own tree (`memd.errors`). A message states the rule that was
broken, the value that broke it and what to do about it. Violations of our own invariants are
`assert`s and are not part of this tree, with the exception of `ResidencyError`, which integrity
checks raise so that a server can report it.
"""

from __future__ import annotations

__all__ = ["BudgetError", "ConfigError", "HeteroError", "ProfileError", "ResidencyError"]


class HeteroError(Exception):
    """Root of the tree: catch it to handle anything this package reports."""


class ConfigError(HeteroError):
    """Settings, inputs or an environment with which the work cannot be done."""


class ProfileError(HeteroError):
    """A head profile that cannot be read, breaks its schema or belongs to another model.

    Attributes:
        field: Dotted path of the offending field, for example `thresholds.stable`; empty if the
            file as a whole is at fault.
        rule: What the field must satisfy.
        value: Short rendering of what was found instead.
        remedy: What the user can do; empty if nothing beyond following the rule.
    """

    def __init__(self, rule: str, *, field: str = "", value: str = "", remedy: str = "") -> None:
        """Composes the message from its parts.

        Args:
            rule: What must hold, as a clause: "must be 1 to 4".
            field: Dotted path of the field the rule is about.
            value: What was found, already shortened for display.
            remedy: What to do about it, as a sentence without its full stop.
        """
        self.rule = rule
        self.field = field
        self.value = value
        self.remedy = remedy
        message = f"{field} {rule}" if field else rule
        if value:
            message += f", got {value}"
        if remedy:
            message += f". {remedy}"
        super().__init__(message)


class BudgetError(HeteroError):
    """A resident share of the KV cache at or under the share of the heads that keep everything."""


class ResidencyError(HeteroError):
    """Bookkeeping of resident, staged or fetched rows that contradicts itself."""
