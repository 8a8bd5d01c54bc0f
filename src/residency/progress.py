"""Progress with an estimate of what is left: rich bars in a terminal, plain lines elsewhere, or nothing."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

Advance = Callable[..., None]


class Progress:
    """Silent progress: the interface, and what tests and library callers use."""

    def say(self, text: str) -> None:
        """One line for the user."""

    @contextlib.contextmanager
    def task(self, label: str, total: int) -> Iterator[Advance]:
        """Work of `total` units; the block calls `advance(n)`, optionally with a short note such as a loss."""
        yield lambda n=1, note="": None


class PlainProgress(Progress):
    """Lines for logs: a start, at most one line every `every` seconds, and the end with the time it took."""

    def __init__(self, stream: Any = None, every: float = 15.0) -> None:
        self.stream, self.every = stream or sys.stderr, every

    def say(self, text: str) -> None:
        """One line."""
        self.stream.write(text + "\n")
        self.stream.flush()

    @contextlib.contextmanager
    def task(self, label: str, total: int) -> Iterator[Advance]:
        """See `Progress.task`."""
        start = last = time.monotonic()
        done = 0

        def advance(n: int = 1, note: str = "") -> None:
            nonlocal done, last
            done += n
            now = time.monotonic()
            if now - last >= self.every and done < total:
                last = now
                left = (now - start) / max(done, 1) * (total - done)
                self.say(f"  {label}: {done}/{total}, about {duration(left)} left{f', {note}' if note else ''}")

        yield advance
        spent = time.monotonic() - start
        if spent >= self.every:
            self.say(f"  {label}: {done}/{total} in {duration(spent)}")


class RichProgress(Progress):
    """Bars for a terminal."""

    def __init__(self, console: Any = None) -> None:
        from rich.console import Console

        self.console = console or Console(stderr=True)

    def say(self, text: str) -> None:
        """One line above the bars."""
        self.console.print(text, highlight=False, markup=False)

    @contextlib.contextmanager
    def task(self, label: str, total: int) -> Iterator[Advance]:
        """See `Progress.task`."""
        from rich import progress as bars

        columns = (
            bars.TextColumn("  {task.description}"),
            bars.BarColumn(bar_width=28),
            bars.MofNCompleteColumn(),
            bars.TimeElapsedColumn(),
            bars.TextColumn("left"),
            bars.TimeRemainingColumn(),
            bars.TextColumn("[dim]{task.fields[note]}"),
        )
        with bars.Progress(*columns, console=self.console, transient=True) as view:
            key = view.add_task(label, total=total, note="")

            def advance(n: int = 1, note: str = "") -> None:
                view.update(key, advance=n)
                if note:
                    view.update(key, note=note)

            yield advance


def choose(*, quiet: bool = False) -> Progress:
    """Bars when standard error is a terminal, lines otherwise, nothing when quiet."""
    if quiet:
        return Progress()
    return RichProgress() if sys.stderr.isatty() else PlainProgress()


def duration(seconds: float) -> str:
    """`8 s`, `2 min 05 s`, `1 h 10 min`."""
    s = round(seconds)
    if s < 60:
        return f"{s} s"
    return f"{s // 60} min {s % 60:02d} s" if s < 3600 else f"{s // 3600} h {s % 3600 // 60:02d} min"
