"""Measured chunks on disk: one safetensors file per chunk of the pool, made here or by the workers of a cluster.

A file that is there and whole is not made again, so a killed step goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from residency.curate.measuring import EMBEDDINGS, GRADIENTS, Measurer, Work

if TYPE_CHECKING:
    from residency.curate.pool import Pool


def measure(
    pool: Pool, work: Work, measurer: Measurer, folder: Path, scale: str, workers: int, advance: Callable[..., None]
) -> list[Path]:
    """Measure every chunk that is not yet measured.

    Args:
        pool: The rows.
        work: What to measure.
        measurer: Measures in this process.
        folder: Where the files lie.
        scale: "here" or "ray".
        workers: Processes with "ray".
        advance: Called with the number of rows done.

    Returns:
        One file per chunk, in order.
    """
    from residency.rows import load

    folder.mkdir(exist_ok=True)
    files = [folder / f"{i:06d}.safetensors" for i in range(len(pool.files))]
    todo = []
    for chunk, file in zip(pool.files, files, strict=True):
        if file.exists():
            advance(_rows(file))
        else:
            todo.append((chunk, file))
    if scale == "ray" and todo:
        from residency.curate.cluster import measured

        for i, data in measured([chunk for chunk, _ in todo], work, workers):
            _keep(todo[i][1], data)
            advance(_rows(todo[i][1]))
        return files
    for chunk, file in todo:
        rows, told = load(chunk), [0]

        def tell(n: int, told: list[int] = told) -> None:
            told[0] += n
            advance(n)

        _keep(file, packed(measurer(rows, tell)))
        advance(len(rows) - told[0])
    return files


def packed(columns: dict[str, np.ndarray]) -> bytes:
    """A measured chunk as bytes."""
    from safetensors.numpy import save

    return save({name: np.ascontiguousarray(values) for name, values in columns.items()})


def join(files: list[Path], scratch: Path) -> dict[str, np.ndarray]:
    """All chunks as one: columns in memory, embeddings and gradients as memory maps.

    Args:
        files: The measured chunks, in order.
        scratch: Where the maps lie.
    """
    from safetensors.numpy import load_file

    parts: dict[str, list[np.ndarray]] = {}
    wide: dict[str, tuple[Any, Path, Any, list[int]]] = {}
    for file in files:
        for name, values in load_file(file).items():
            if name not in (EMBEDDINGS, GRADIENTS):
                parts.setdefault(name, []).append(values)
                continue
            if name not in wide:
                path = scratch / f"{name.removeprefix('#')}.bin"
                wide[name] = (path.open("wb"), path, values.dtype, [0, *values.shape[1:]])
            handle, _, _, shape = wide[name]
            handle.write(values.tobytes())
            shape[0] += len(values)
    joined = {name: np.concatenate(each) for name, each in parts.items()}
    for name, (handle, path, dtype, shape) in wide.items():
        handle.close()
        joined[name] = np.memmap(path, dtype, "r", shape=tuple(shape))
    return joined


def _keep(file: Path, data: bytes) -> None:
    """Write whole or not at all."""
    part = file.with_suffix(".part")
    part.write_bytes(data)
    part.replace(file)


def _rows(file: Path) -> int:
    from safetensors import safe_open

    with safe_open(file, "np") as found:
        name = next(iter(found.keys()))
        return int(found.get_slice(name).get_shape()[0])
