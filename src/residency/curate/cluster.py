"""Measuring chunks with Ray Data: for pools, or models, that want more than one process or one machine.

Every chunk is a task of a pool of actors; each actor loads the models once. A worker that dies is started again and its
chunk measured again, which gives the same figures, because a chunk's figures depend on the chunk alone. Rows travel to
the workers with the task and figures travel back, so machines need share no file system; models must lie under the same
path everywhere (or be embedded and installed there). The trusted rows travel too.

Ray's address is taken from RAY_ADDRESS; without one, a cluster of this machine is started and stopped again.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from residency.curate.chunks import packed
from residency.curate.measuring import Measurer, Work
from residency.errors import MissingError


class Worker:
    """One actor: measures chunks that arrive as bytes."""

    def __init__(self, work: Work, examples: bytes) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="residency-")
        file = Path(self._folder.name) / "examples.jsonl"
        file.write_bytes(examples)
        self._measurer = Measurer(replace(work, examples=file))

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """One chunk (JSONL bytes) → its measured columns (safetensors bytes)."""
        from residency.rows import load

        found = []
        names = [Path(str(path)).name for path in batch["path"]]
        for name, rows in zip(names, batch["bytes"], strict=True):
            file = Path(self._folder.name) / name
            file.write_bytes(rows)
            found.append(packed(self._measurer(load(file))))
            file.unlink()
        return {"name": np.array(names), "data": np.array(found, object)}


def measured(chunks: list[Path], work: Work, workers: int) -> Iterator[tuple[int, bytes]]:
    """Measure chunk files on a Ray cluster.

    Args:
        chunks: JSONL files of rows.
        work: What to measure.
        workers: Actors.

    Yields:
        (number of the chunk, its columns as bytes), as they are finished.

    Raises:
        MissingError: When Ray is not installed.
    """
    try:
        import ray
        from ray.data import ActorPoolStrategy, DataContext
    except ModuleNotFoundError as error:
        raise MissingError(
            f"`scale: ray` needs the package `{error.name}`, which is not installed",
            hint="pip install 'residency[scale]'",
        ) from None

    ours = not ray.is_initialized()
    if ours:
        ray.init(log_to_driver=False, include_dashboard=False, logging_level=logging.ERROR)
    context, logger = DataContext.get_current(), logging.getLogger("ray.data")
    before = context.enable_progress_bars, logger.level
    context.enable_progress_bars = False
    logger.setLevel(logging.ERROR)
    try:
        # the files lie where this process runs: they are read there, a few ahead of the workers, and travel as bytes
        files = ray.data.read_binary_files(
            [str(file) for file in chunks],
            include_paths=True,
            override_num_blocks=len(chunks),
            label_selector={"ray.io/node-id": ray.get_runtime_context().get_node_id()},
            num_cpus=0,
        )
        done = files.map_batches(
            Worker,
            fn_constructor_args=(work, work.examples.read_bytes()),
            batch_size=1,
            batch_format="numpy",
            compute=ActorPoolStrategy(size=min(workers, len(chunks))),
            num_cpus=1,
            num_gpus=1 if work.device == "cuda" else 0,
        )
        numbers = {file.name: i for i, file in enumerate(chunks)}
        for each in done.iter_rows():
            yield numbers[each["name"]], bytes(each["data"])
    finally:
        context.enable_progress_bars = before[0]
        logger.setLevel(before[1])
        if ours:
            ray.shutdown()
