"""The errors a user sees: what is wrong, where, and what to do about it.

Every error that bad input, a full disk or a missing package can cause is a `ResidencyError`. The command line prints it
without a traceback and leaves with its exit code; a library caller catches one class.
"""

from __future__ import annotations


class ResidencyError(Exception):
    """Something the user can act on.

    Args:
        what: One sentence that says what is wrong.
        where: The place: `recipe.yaml:12:5`, `pool.jsonl:318`, a folder, a key.
        hint: What to do about it.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str | None = None, hint: str | None = None) -> None:
        self.what, self.where, self.hint = what, where, hint
        super().__init__(str(self))

    def __str__(self) -> str:
        head = f"{self.where}: {self.what}" if self.where else self.what
        return f"{head}\n  → {self.hint}" if self.hint else head

    def __reduce__(self):  # keyword-only arguments survive a process boundary
        return (_rebuild, (type(self), self.what, self.where, self.hint))


def _rebuild(cls: type[ResidencyError], what: str, where: str | None, hint: str | None):
    return cls(what, where=where, hint=hint)


class RecipeError(ResidencyError):
    """The recipe cannot be read, has an unknown key or a value out of range."""

    exit_code = 2


class PlanError(ResidencyError):
    """The recipe reads well but its steps cannot work in this order or with these models."""

    exit_code = 3


class DataError(ResidencyError):
    """A data source cannot be used as it is (single bad rows go to quarantine instead)."""

    exit_code = 4


class MissingError(ResidencyError):
    """A package, an embedded artefact or a hub file is not on this machine."""

    exit_code = 5


class StoreError(ResidencyError):
    """The run directory cannot be used: in use, damaged, not writable or out of space."""

    exit_code = 6


class ExportError(ResidencyError):
    """This model cannot be written in the format asked for, or parity was not reached."""

    exit_code = 7
