"""Measured, not estimated: the peak memory of a block, the machine it ran on, and how fast that machine is.

Linux keeps a high-water mark of each process's resident memory (VmHWM). Writing 5 to /proc/self/clear_refs lowers
the mark to what is resident now, so the mark at the end of a block is that block's peak: exact, at no cost, and it
sees what native libraries allocate. Where the kernel does not allow that, a thread samples the resident size every
10 ms (psutil where it is installed) and can miss a shorter peak; `exact` tells which it was. On CUDA the allocator's
own mark is read as well.

    with PeakMemory() as peak:
        train()
    peak.bytes, peak.rise, peak.cuda_bytes

Blocks may nest: lowering the mark for an inner block first tells the outer ones what it was. Threads of one process
share their memory, so a block's peak includes what other threads did meanwhile.

Source: proc_pid_clear_refs(5). Cost: two small file reads; `cpu_gflops` about 0.2 seconds once per process.
Nothing here imports torch; `machine`, `PeakMemory` and `now` look at it only if the caller has imported it.
"""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import re
import sys
import threading
import time
from pathlib import Path
from typing import Any, Self

import numpy as np

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_open: list[PeakMemory] = []  # blocks that are running, outermost first
_lock = threading.Lock()


class PeakMemory:
    """Peak resident memory of a `with` block.

    Attributes:
        bytes: Highest resident size of the process during the block.
        rise: How far that lies above the size at entry.
        cuda_bytes: Peak of CUDA's allocator on all devices during the block, or None without CUDA.
        exact: True if the kernel's high-water mark was read, False if sampled.
    """

    def __init__(self) -> None:
        self.bytes = self.rise = 0
        self.cuda_bytes: int | None = None
        self.exact = False
        self._start = 0
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        with _lock:
            _fold()
            self._start = self.bytes = resident()
            self.exact = _lower_mark()
            _open.append(self)
        if not self.exact:
            self._thread = threading.Thread(target=self._sample, daemon=True)
            self._thread.start()
        if cuda := _cuda():
            for device in range(cuda.device_count()):
                cuda.reset_peak_memory_stats(device)
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread is not None:
            self._done.set()
            self._thread.join()
        with _lock:
            _fold()
            _open.remove(self)
        self.rise = max(0, self.bytes - self._start)
        if cuda := _cuda():
            self.cuda_bytes = sum(cuda.max_memory_allocated(device) for device in range(cuda.device_count()))

    def _sample(self) -> None:
        while not self._done.wait(0.01):
            self.bytes = max(self.bytes, resident())


def _fold() -> None:
    """Tell every running block how high the mark stands; the caller holds the lock."""
    now = max(resident(), _status("VmHWM")) if any(block.exact for block in _open) else resident()
    for block in _open:
        block.bytes = max(block.bytes, now if block.exact else resident())


def _lower_mark() -> bool:
    """Lower VmHWM to the present size; False where the kernel does not."""
    try:
        _CLEAR.write_text("5")
        return _status("VmHWM") > 0
    except OSError:
        return False


def _status(key: str) -> int:
    """One entry of /proc/self/status in bytes, 0 where there is none."""
    try:
        found = re.search(rf"^{key}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


def resident() -> int:
    """Resident memory of this process in bytes; 0 if neither /proc nor psutil tells."""
    if size := _status("VmRSS"):
        return size
    try:
        import psutil
    except ImportError:
        return 0
    return psutil.Process().memory_info().rss


def release() -> None:
    """Give freed memory back to the system, so that the next block's peak is its own."""
    import ctypes
    import gc

    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc only
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    if (cuda := _cuda()) is not None:
        cuda.empty_cache()


def machine() -> dict[str, Any]:
    """The machine, in words and numbers that belong beside every measured speed.

    Returns:
        cpu (model name), cores (that this process may use), memory_bytes (physical, or the container's limit), system,
        python, device ("cuda" or "cpu"), gpu (its name, or None).
    """
    cpu = platform.processor() or platform.machine()
    try:
        names = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        cpu = names[1].strip() if names else cpu
    except OSError:
        pass
    torch = sys.modules.get("torch")
    gpu = torch.cuda.get_device_name(0) if torch is not None and torch.cuda.is_available() else None
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "memory_bytes": _memory(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "device": "cuda" if gpu else "cpu",
        "gpu": gpu,
    }


def _memory() -> int:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        try:
            import psutil
        except ImportError:
            return 0
        total = psutil.virtual_memory().total
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            total = min(total, int(Path(limit).read_text()))
        except (OSError, ValueError):  # "max" means none
            continue
    return total


def now(device: Any) -> float:
    """Seconds on a clock that is read when the device has done what it was given.

    Args:
        device: A torch.device.
    """
    if device.type != "cpu":
        sys.modules["torch"].accelerator.synchronize(device)
    return time.perf_counter()


@functools.cache
def cpu_gflops(size: int = 768) -> float:
    """Billions of fp32 operations per second of one matrix product: the best of a few runs of numpy's sgemm.

    An upper bound for what a model reaches here. Measured once per process.
    """
    a = np.random.default_rng(0).random((size, size), dtype=np.float32)
    a @ a  # starts the threads
    best, until = float("inf"), time.perf_counter() + 0.2
    while time.perf_counter() < until:
        begin = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best / 1e9


def _cuda() -> Any:
    """torch.cuda if the caller uses it, else None; never starts it."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None
