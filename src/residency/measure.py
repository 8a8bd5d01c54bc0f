"""What a run costs: peak memory of a block, the machine, and how fast it multiplies matrices. torch is imported only if it already is."""

from __future__ import annotations

import os
import platform
import sys
import threading
import time
from pathlib import Path
from typing import Any

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


class PeakMemory:
    """Peak resident memory of this process while a block runs.

    On Linux the kernel's own high-water mark is reset and read, so no peak is missed; elsewhere a thread samples every 20 ms.

    Example:
        >>> with PeakMemory() as peak:
        ...     work()
        >>> peak.bytes, peak.cuda_bytes
    """

    def __init__(self) -> None:
        self.bytes = 0
        self.cuda_bytes = 0
        self._stop: threading.Event | None = None

    def __enter__(self) -> PeakMemory:
        self.bytes = 0
        try:
            _CLEAR.write_text("5")
        except OSError:
            self._sample()
        if (cuda := _cuda()) is not None:
            cuda.reset_peak_memory_stats()
        return self

    def __exit__(self, *error: object) -> None:
        if self._stop is not None:
            self._stop.set()
            self._thread.join()
        else:
            self.bytes = _high_water()
        if (cuda := _cuda()) is not None:
            self.cuda_bytes = int(cuda.max_memory_allocated())

    def _sample(self) -> None:
        import psutil

        process, stop = psutil.Process(), threading.Event()

        def watch() -> None:
            while not stop.wait(0.02):
                self.bytes = max(self.bytes, process.memory_info().rss)

        self.bytes = process.memory_info().rss
        self._stop, self._thread = stop, threading.Thread(target=watch, daemon=True)
        self._thread.start()


def _high_water() -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def _cuda() -> Any:
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized() else None


def machine() -> dict[str, Any]:
    """The processor, cores, memory, system and, when torch is loaded, the GPU."""
    torch = sys.modules.get("torch")
    gpu = torch.cuda.get_device_name(0) if torch is not None and torch.cuda.is_available() else None
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count() or 1,
        "memory_bytes": _memory(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "device": "cuda" if gpu else "cpu",
        "gpu": gpu,
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0


def cpu_gflops(size: int = 1024, seconds: float = 0.3) -> float:
    """Float32 matrix products per second on this CPU, in GFLOP/s: the best of those that fit into `seconds`."""
    import numpy as np

    a = np.random.default_rng(0).standard_normal((size, size), dtype=np.float32)
    best, end = float("inf"), time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
        if time.perf_counter() > end:
            return 2 * size**3 / best / 1e9
