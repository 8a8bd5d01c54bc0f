"""The C kernel of `sparseffn.c`: compiled once per machine by the user's own C compiler, called without a copy.

The wheel stays pure Python. On first use `cc` (or $CC, gcc, clang) compiles 200 lines for exactly this processor, which
takes about a second, into the cache folder; the name of the result covers source, flags, compiler and processor, so
that a shared home folder or an upgrade compiles again. It is called through ctypes on the tensors' own memory.

No compiler, a platform that cannot load it, or RESIDENCY_NO_KERNEL=1: `kernel()` is None, said once, and callers fall
back to torch operations.

Threads are OpenMP's. The shared library asks for libgomp.so.1, which torch has loaded already, so both use one pool.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from residency.errors import ResidencyError

SOURCE = Path(__file__).with_name("sparseffn.c")
AHEAD = 1024
"""Bytes of the next active rows fetched ahead: measured, see benchmarks/sparse_ffn.py."""
FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-shared", "-w", f"-DAHEAD={AHEAD}")
VARIANTS = (("-march=native", "-fopenmp"), ("-march=native",), ())
"""Tried in this order; Apple's clang has no OpenMP."""
GRAIN = 1 << 19
"""Bytes of gate weights that are worth a thread of their own. Our choice."""


class Kernel:
    """The compiled functions, one per dtype of the weights.

    Args:
        file: The shared library.
    """

    dtypes = (torch.float32, torch.bfloat16)

    def __init__(self, file: Path) -> None:
        library = ctypes.CDLL(str(file))
        self._gated = {torch.float32: library.gated_f32, torch.bfloat16: library.gated_bf16}
        for function in self._gated.values():
            function.argtypes = [ctypes.c_void_p] * 6 + [ctypes.c_long] * 3 + [ctypes.c_float, ctypes.c_int]
            function.restype = ctypes.c_long
        self.active = 0

    def __call__(self, x: Tensor, gate: Tensor, up: Tensor, down: Tensor, threshold: float) -> Tensor:
        """FFN(x) for a few tokens.

        Args:
            x: [B, D] on the CPU, B ≥ 1, in the dtype of the weights.
            gate: [F, D], contiguous.
            up: [F, D], contiguous.
            down: [F, D], contiguous: the transpose of down_proj.weight.
            threshold: t of FATReLU.

        Returns:
            [B, D]. `self.active` says how many rows of `up` and `down` were read.

        Raises:
            ValueError: When the tensors are not as described; nothing is read then.
        """
        rows, width = gate.shape
        if not (
            x.ndim == 2
            and x.shape[1] == width
            and up.shape == down.shape == gate.shape
            and x.dtype == gate.dtype == up.dtype == down.dtype
            and x.dtype in self._gated
            and x.device.type == gate.device.type == up.device.type == down.device.type == "cpu"
            and gate.is_contiguous()
            and up.is_contiguous()
            and down.is_contiguous()
        ):
            raise ValueError("the kernel takes contiguous float32 or bfloat16 matrices [F, D] and x [B, D] on the CPU")
        tokens = x.shape[0]
        inputs = x.float().contiguous()
        y = torch.empty_like(inputs)
        threads = max(1, min(torch.get_num_threads(), gate.nbytes // GRAIN))
        work = torch.empty(threads + 1, tokens, width)
        active = self._gated[x.dtype](
            inputs.data_ptr(),
            gate.data_ptr(),
            up.data_ptr(),
            down.data_ptr(),
            y.data_ptr(),
            work.data_ptr(),
            tokens,
            width,
            rows,
            threshold,
            threads,
        )
        if active < 0:
            raise MemoryError("no memory for the list of active rows")
        self.active = active
        return y if x.dtype == torch.float32 else y.to(x.dtype)


@functools.cache
def kernel() -> Kernel | None:
    """The kernel of this machine, compiled if need be; None where there is none, said once as a warning."""
    if os.environ.get("RESIDENCY_NO_KERNEL"):
        return None
    try:
        return Kernel(build())
    except (OSError, RuntimeError, ResidencyError) as error:
        warnings.warn(
            f"the sparse kernel is not available ({error}); torch operations do the same more slowly",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def build(folder: Path | None = None) -> Path:
    """Compile the kernel unless it is there already, and return the shared library.

    Args:
        folder: Where to keep it; by default `kernels` in the cache folder.

    Raises:
        RuntimeError: When there is no compiler or it fails; the message has its first error.
    """
    from residency import embedded, store

    compiler = _compiler()
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=False).stdout
    text = SOURCE.read_text(encoding="utf-8")
    parts = [text, FLAGS, VARIANTS, compiler, version, platform.platform(), _processor()]
    address = hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
    final = (folder or embedded.cache() / "kernels") / f"sparseffn-{address}"
    if store.damage(final, address) is None:
        return final / "sparseffn.so"
    if final.exists():
        shutil.rmtree(final, ignore_errors=True)
    failure = ""
    for variant in VARIANTS:
        try:
            with store.sealed(final, address) as temporary:
                command = [*compiler, *FLAGS, *variant, str(SOURCE), "-o", str(temporary / "sparseffn.so")]
                done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
                if done.returncode:
                    said = [line for line in done.stderr.splitlines() if "error" in line]
                    failure = failure or next(iter(said), f"exit {done.returncode}")
                    raise RuntimeError(failure)
        except RuntimeError:
            continue
        except subprocess.TimeoutExpired:
            raise RuntimeError("the C compiler took more than two minutes") from None
        except Exception:
            if store.damage(final, address) is None:  # another process was faster
                return final / "sparseffn.so"
            raise
        return final / "sparseffn.so"
    raise RuntimeError(f"{compiler[0]}: {failure}")


def _compiler() -> list[str]:
    if given := os.environ.get("CC"):
        return shlex.split(given)
    for name in ("cc", "gcc", "clang"):
        if found := shutil.which(name):
            return [found]
    raise RuntimeError("no C compiler (cc, gcc or clang) on this machine")


def _processor() -> Any:
    """What -march=native depends on."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
        return sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    return platform.processor()
