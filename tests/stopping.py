"""A training that is killed after so many optimiser steps."""

from __future__ import annotations

import contextlib

from residency.progress import Progress


class Stopped(Exception):
    """The kill."""


class StopAfter(Progress):
    """Progress that raises `Stopped` instead of reporting a step too many."""

    def __init__(self, steps):
        super().__init__()
        self.left = steps

    def task(self, label, total):
        @contextlib.contextmanager
        def context():
            def advance(n=1, note=""):
                self.left -= n
                if self.left < 0:
                    raise Stopped

            yield advance

        return context()
