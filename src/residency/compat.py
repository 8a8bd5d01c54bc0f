"""Every shim for another library's behaviour; nothing is patched at import."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' progress bars and advice inside the block, and restore its process-wide settings."""
    import transformers.utils.logging as log

    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()


def load_tensors(path: Path) -> dict[str, Any]:
    """Tensors of a PyTorch file: the only place that unpickles, and it refuses everything but tensors.

    Needed for weights that exist only as .pth (EfficientNet-Lite0's package). May go when that package ships
    safetensors.
    """
    import torch

    return torch.load(path, map_location="cpu", weights_only=True)


def pick_device(wanted: str = "auto") -> str:
    """The device to compute on.

    Raises:
        ResidencyError: When a device was asked for that is not there.
    """
    import torch

    from residency.errors import MissingError

    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if wanted == "auto":
        return next(d for d in ("cuda", "mps", "cpu") if there[d])
    if not there[wanted]:
        raise MissingError(f"the device `{wanted}` is not available here", hint="use `device: auto` or `device: cpu`")
    return wanted


def fast_bf16(device: str) -> bool:
    """Whether bf16 autocast is both supported and faster here: Ampere or newer, or a CPU with AVX512-BF16 or AMX."""
    import torch

    if device == "cuda":
        return torch.cuda.is_bf16_supported()
    if device == "cpu":
        # torch >= 2.6: the only public-enough query; on absence we stay in float32, which is always right
        check = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
        return bool(check and check())
    return False


def streamer_of_generate() -> Any:
    """The streamer that was given to the `generate` that called our caller, a `custom_generate`; None without one.

    transformers up to 5.23 does not hand it on to callables (`_extract_generation_mode_kwargs` replaces what it had
    collected by the arguments only the callable knows), so it is read from that frame. May go when it is passed on.
    """
    frame = sys._getframe(2)
    if frame.f_code.co_name == "generate" and "custom_generate" in frame.f_locals:
        return frame.f_locals.get("streamer")
    return None
