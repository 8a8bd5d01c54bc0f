"""Numbers and text as people read them: the one place that decides decimals, units and signs.

Every function takes what a record may hold, including nothing or nonsense, and answers with text;
what is not a finite number becomes an em dash.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

NONE = "—"
MINUS = "−"


def dig(value: Any, *path: str, default: Any = None) -> Any:
    """Walk down nested mappings; ``default`` where a key is missing or null."""
    for key in path:
        if not isinstance(value, dict):
            return default
        value = value.get(key)
    return default if value is None else value


def mapping(value: Any, *path: str) -> dict[str, Any]:
    """The mapping at ``path``, or an empty one."""
    found = dig(value, *path)
    return found if isinstance(found, dict) else {}


def sequence(value: Any, *path: str) -> list[Any]:
    """The list at ``path``, or an empty one."""
    found = dig(value, *path)
    return list(found) if isinstance(found, list | tuple) else []


def mappings(value: Any, *path: str) -> list[dict[str, Any]]:
    """The mappings in the list at ``path``; anything else in it is left out."""
    return [entry for entry in sequence(value, *path) if isinstance(entry, dict)]


def number(value: Any) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def plain(value: Any) -> str:
    """Any flat value of a record as short text: 12,345 · 0.0001234 · yes · text."""
    if value is None:
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}".replace("-", MINUS)
    if isinstance(value, float):
        return f"{value:.4g}".replace("-", MINUS) if math.isfinite(value) else NONE
    if isinstance(value, list | tuple):
        return ", ".join(plain(entry) for entry in value) or NONE
    if isinstance(value, dict):
        return ", ".join(f"{key}: {plain(entry)}" for key, entry in value.items()) or NONE
    return str(value)


def count(value: Any) -> str:
    """A count: 9,832 · 134.5 M · 1.24 B."""
    found = number(value)
    if found is None:
        return NONE
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if abs(found) >= size:
            digits = 2 if abs(found) < 10 * size else 1
            return f"{found / size:.{digits}f} {unit}"
    return f"{found:,.0f}"


def size(value: Any) -> str:
    """Bytes in decimal units: 768 B · 23.0 kB · 269 MB · 1.24 GB."""
    found = number(value)
    if found is None:
        return NONE
    for scale, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(found) >= scale:
            return f"{_three(found / scale)} {unit}"
    return f"{found:.0f} B"


def duration(value: Any) -> str:
    """Seconds as a person says them: 0.4 s · 12 s · 3 min 20 s · 2 h 05 min."""
    found = number(value)
    if found is None:
        return NONE
    if found < 10:
        return f"{found:.1f} s"
    whole = round(found)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def measure(value: Any, unit: str = "") -> str:
    """A measured number to three digits, with its unit: 41.2 · 85.0 ms · 1,240."""
    found = number(value)
    if found is None:
        return NONE
    return f"{_three(found)} {unit}".rstrip()


def moment(value: Any) -> str:
    """An ISO time to the minute: 2026-10-01 09:30."""
    return str(value)[:16].replace("T", " ") if value else NONE


def clip(text: Any, limit: int) -> str:
    """At most ``limit`` characters, an ellipsis standing for the rest."""
    found = "" if text is None else str(text)
    return found if len(found) <= limit else found[: limit - 1].rstrip() + "…"


def _three(value: float) -> str:
    """Three significant digits, never an exponent."""
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(digits, 6)}f}".replace("-", MINUS)


@dataclass(frozen=True)
class Scale:
    """How the scores of one exam are written.

    Attributes:
        unit: ``share`` is written without its leading zero (.72); any other unit as it is.
        decimals: Digits after the point, the same in the whole report.
        higher: Whether a higher score is the better one.
    """

    unit: str = "share"
    decimals: int = 2
    higher: bool = True

    @classmethod
    def of(cls, exam: dict[str, Any], values: Iterable[Any], n: int = 0) -> Scale:
        """The scale for an exam described by ``exam`` whose scores are ``values``.

        Args:
            exam: The ``task`` or ``guard`` entry of a record.
            values: Every score the report will show, to choose the decimals by.
            n: Items in the exam; a share over more than 200 gets a third digit.
        """
        unit = str(dig(exam, "unit", default="share"))
        higher = dig(exam, "higher_is_better", default=True) is not False
        if unit == "share":
            return cls(unit, 3 if n > 200 else 2, higher)
        largest = max((abs(v) for v in map(number, values) if v is not None), default=1.0)
        power = math.floor(math.log10(largest)) if largest > 0 else 0
        return cls(unit, min(6, max(1, 3 - power)), higher)

    @property
    def suffix(self) -> str:
        """The unit after a number in running text, with its space; nothing for a share."""
        return "" if self.unit == "share" else f" {self.unit}"

    def text(self, value: Any) -> str:
        """A score: .72, 1.370, or a dash."""
        found = number(value)
        return NONE if found is None else (MINUS if found < 0 else "") + self._size(found)

    def signed(self, value: Any) -> str:
        """A difference with its sign: +.18, −.01, ±.00.

        One that would round to zero gets a digit more (−.004), so that the bound of an interval
        that excludes zero does not look as if it touched it.
        """
        found = number(value)
        if found is None:
            return NONE
        digits = self._size(found)
        if not digits.strip("0."):
            digits = self._size(found, self.decimals + 1)
            if not digits.strip("0."):
                return "±" + self._size(0.0)
        return ("+" if found > 0 else MINUS) + digits

    def span(self, low: Any, high: Any, *, signed: bool = False) -> str:
        """An interval: .60–.83 of scores, +.08…+.28 of differences."""
        if number(low) is None or number(high) is None:
            return NONE
        if signed:
            return f"{self.signed(low)}…{self.signed(high)}"
        return f"{self.text(low)}–{self.text(high)}"

    def _size(self, value: float, decimals: int | None = None) -> str:
        digits = f"{abs(value):,.{self.decimals if decimals is None else decimals}f}"
        return digits[1:] if self.unit == "share" and digits.startswith("0.") else digits
