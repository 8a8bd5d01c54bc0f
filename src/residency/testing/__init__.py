"""The common suite: what every method of the catalogue must pass, by role; public, so that yours can be checked too.

    from residency.testing import check_method check_method("bild")                 # a catalogue row: runs the
    checks of its role, raises on the first list of failures check_method(MyCase())               # your own:
    subclass the case of your role and give it your method

A case supplies a tiny input, the baseline its method degenerates to, and an independent reference; the checks come
with the role (`residency.testing.roles`). Every check is a method named `check_…` whose docstring says what must
hold.
"""

from __future__ import annotations

from dataclasses import dataclass

from residency import catalog
from residency.testing.roles import Case

__all__ = ["Case", "CheckResult", "check_method", "checks_of"]


@dataclass(frozen=True)
class CheckResult:
    """One check: its name, what must hold, and why it failed (None when it passed)."""

    name: str
    promise: str
    failure: str | None


def case_of(name: str) -> Case:
    """The case of a catalogue row.

    Raises:
        AssertionError: When the row has none.
    """
    from residency.testing.cases import CASES

    row = catalog.method(name)
    assert name in CASES, f"the method `{name}` has no case: add one to residency/testing/cases/"
    case = CASES[name]()
    case.row = row
    assert case.role == row.role, f"`{name}` is a {row.role}, but its case is for a {case.role}"
    return case


def checks_of(case: Case) -> list[str]:
    """The names of a case's checks, in the order in which they are defined."""
    found: dict[str, None] = {}
    for cls in reversed(type(case).__mro__):
        found |= {name: None for name in vars(cls) if name.startswith("check_")}
    return list(found)


def check_method(method: str | Case, *, only: str | None = None) -> list[CheckResult]:
    """Run the common suite over one method.

    Args:
        method: A catalogue name, or a case of your own.
        only: Run just this check.

    Returns:
        One result per check.

    Raises:
        AssertionError: When any check failed; the message lists them all.
    """
    case = case_of(method) if isinstance(method, str) else method
    results = []
    for name in checks_of(case):
        if only is not None and name != only:
            continue
        check = getattr(case, name)
        try:
            check()
            failure = None
        except AssertionError as error:
            failure = str(error) or "assertion failed"
        except Exception as error:
            failure = f"{type(error).__name__}: {error}"
        results.append(CheckResult(name.removeprefix("check_"), (check.__doc__ or "").strip(), failure))
    failed = [r for r in results if r.failure]
    assert not failed, "\n".join(f"{case.name}: {r.name}: {r.failure}\n  promise: {r.promise}" for r in failed)
    return results
