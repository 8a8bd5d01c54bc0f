"""The only code that writes into a run directory.

A step directory is valid or absent: its files are written into a temporary sibling, flushed to disk, described by a
manifest (sizes, SHA-256) that is written last, and the whole folder is renamed into place. A process killed at any
moment leaves either the finished directory or a `.tmp-*` folder that the next run removes. Single files (run.json,
report.html) are replaced by the same write-flush-rename. Nothing here imports torch, so that looking at a finished
run is fast.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import socket
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from residency.errors import StoreError

SCHEMA = 1
MANIFEST = "manifest.json"
NONDETERMINISTIC = frozenset({"measured", "time"})
"""Keys whose values differ from run to run: seconds, bytes of memory, dates, the machine."""


def canonical(value: Any) -> str:
    """JSON with one spelling per value: sorted keys, no spaces, NaN refused."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def address_of(value: Any) -> str:
    """The content address of a JSON value: 64 hexadecimal digits."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def hash_file(path: Path) -> str:
    """SHA-256 of a file, read in blocks."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def hash_tree(root: Path) -> str:
    """One address for all regular files below a folder, by relative name and content."""
    files = sorted(p for p in root.rglob("*") if p.is_file() and not p.name.startswith("."))
    with ThreadPoolExecutor(max_workers=4) as pool:
        digests = list(pool.map(hash_file, files))
    return address_of([[str(p.relative_to(root)), d] for p, d in zip(files, digests, strict=True)])


def timeless(record: Any) -> Any:
    """A copy of a record without the keys that differ from run to run (`NONDETERMINISTIC`)."""
    if isinstance(record, Mapping):
        return {k: timeless(v) for k, v in record.items() if k not in NONDETERMINISTIC}
    if isinstance(record, list):
        return [timeless(v) for v in record]
    return record


# ------------------------------------------------------------------ disk faults


def disk_fault(error: BaseException, where: Path) -> StoreError | None:
    """The clear form of a full disk, a quota, a read-only or forbidden folder; None when `error` is something else.

    Libraries wrap the operating system's error in their own (safetensors, PyTorch), so the whole chain is searched.
    """
    seen: BaseException | None = error
    while seen is not None:
        code = seen.errno if isinstance(seen, OSError) else None
        text = str(seen)
        full = code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or "os error 28" in text or "code: 28" in text
        full = full or "No space left on device" in text
        if not full and "PytorchStreamWriter failed" in text:
            full = free_bytes(where) < 32 << 20
        if full:
            free = free_bytes(where) / 2**20
            return StoreError(
                f"no space left on the disk while writing ({free:,.0f} MiB free); nothing half-written was kept",
                where=str(where),
                hint="free some space, or move the run with --out, and start it again: finished steps are kept",
            )
        if code in (errno.EROFS, errno.EACCES, errno.EPERM, errno.EEXIST, errno.ENOTDIR):
            return StoreError(
                f"this folder cannot be written ({os.strerror(code)})",
                where=str(getattr(seen, "filename", None) or where),
                hint="choose another folder with --out, or change its permissions",
            )
        seen = seen.__cause__ or seen.__context__
    return None


@contextlib.contextmanager
def disk_errors(where: Path) -> Iterator[None]:
    """Turn disk faults inside the block into a `StoreError` that says what to do."""
    try:
        yield
    except StoreError:
        raise
    except Exception as error:
        fault = disk_fault(error, where)
        if fault is None:
            raise
        raise fault from error


def free_bytes(path: Path) -> int:
    """Free bytes on the disk that holds `path` (or its nearest existing parent)."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


# ------------------------------------------------------------------ atomic writes


def _flush(path: Path) -> None:
    """Force one file or directory to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Replace a file by `text`: a reader sees the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{uuid.uuid4().hex[:8]}-{path.name}")
    with disk_errors(path):
        try:
            with temporary.open("w", encoding="utf-8") as handle:
                handle.write(text)
                handle.flush()
                os.fsync(handle.fileno())
            temporary.replace(path)
            _flush(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def link_folder(source: Path, target: Path) -> None:
    """Give `target` the files of `source` without a second copy on the disk where hard links allow it.

    Finished steps are never modified in place, so two of them may share a file's bytes. Across file systems, or where
    links are refused, the files are copied. Hidden files stay behind, and so does the source's seal.

    Args:
        source: An existing folder; links to files are followed.
        target: Made when missing; files of the same name are an error.
    """
    for file in sorted(p for p in source.rglob("*") if p.is_file()):
        name = file.relative_to(source)
        if any(part.startswith(".") for part in name.parts) or name == Path(MANIFEST):
            continue
        place = target / name
        place.parent.mkdir(parents=True, exist_ok=True)
        with disk_errors(place):
            if place.exists():
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(place))
            try:
                os.link(file.resolve(), place)
            except OSError:
                shutil.copyfile(file, place)


def write_json(path: Path, value: Any) -> None:
    """Replace a file by a JSON value (see `write_text`)."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False))


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        StoreError: When it is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StoreError("there is no such file", where=str(path), hint="is this a run directory?") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise StoreError(f"the file is damaged: {error}", where=str(path), hint="delete it and run again") from None


def seal(folder: Path, address: str) -> None:
    """Flush a folder's files to disk and write its manifest, last."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST):
        _flush(path)
        stat = path.stat()
        files[path.relative_to(folder).as_posix()] = {
            "size": stat.st_size,
            "sha256": hash_file(path),
            "mtime_ns": stat.st_mtime_ns,
        }
    write_json(folder / MANIFEST, {"schema": SCHEMA, "address": address, "files": files})


def damage(folder: Path, address: str | None = None, *, thorough: bool = False) -> str | None:
    """What is wrong with a sealed folder; None when it is whole.

    A file whose size and modification time are those of the manifest is taken as unchanged (as git does); any other is
    hashed, and so is every file when `thorough`.
    """
    if not folder.is_dir():
        return "absent"
    try:
        manifest = read_json(folder / MANIFEST)
        files = manifest["files"]
        listed = [
            (folder / name, entry["size"], entry["sha256"], entry.get("mtime_ns")) for name, entry in files.items()
        ]
        if address is not None and manifest["address"] != address:
            return "the manifest belongs to another step"
    except (StoreError, KeyError, TypeError, AttributeError):
        return "the manifest is damaged"
    for path, size, digest, mtime in listed:
        name = path.relative_to(folder).as_posix()
        if not path.is_file():
            return f"{name} is missing"
        stat = path.stat()
        if stat.st_size != size:
            return f"{name} has {stat.st_size:,} bytes instead of {size:,}"
        if (thorough or stat.st_mtime_ns != mtime) and hash_file(path) != digest:
            return f"{name} has other content than when it was written"
    return None


@contextlib.contextmanager
def sealed(final: Path, address: str) -> Iterator[Path]:
    """Write a folder that appears whole or not at all.

    Yields a temporary folder to write into; when the block ends well it is sealed and renamed to `final` (which
    must not exist), and when it does not, it is removed.
    """
    temporary = final.with_name(f".tmp-{uuid.uuid4().hex[:8]}-{final.name}")
    with disk_errors(final):
        try:
            temporary.mkdir(parents=True)
            yield temporary
            seal(temporary, address)
            temporary.rename(final)
            _flush(final.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


# ------------------------------------------------------------------ the run directory


class RunStore:
    """A run directory: `run.json`, `report.html`, `steps/`, `work/` (scratch of unfinished steps), `quarantine.jsonl`.

    Args:
        root: The directory; made when missing.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.steps = root / "steps"
        self.work = root / "work"
        self.record_file = root / "run.json"
        self.quarantine_file = root / "quarantine.jsonl"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the directory for one process; the lock dies with the process.

        Raises:
            StoreError: When another process holds it.
        """
        from filelock import FileLock, Timeout

        with disk_errors(self.root):
            self.steps.mkdir(parents=True, exist_ok=True)
            self.work.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.root / ".lock", blocking=False)
        holder = self.root / ".holder"
        try:
            with disk_errors(self.root):
                lock.acquire()
        except Timeout:
            who = holder.read_text(encoding="utf-8") if holder.exists() else "another process"
            raise StoreError(
                f"this run directory is in use by {who}",
                where=str(self.root),
                hint="wait for it to end, or give this run a directory of its own with --out",
            ) from None
        try:
            write_text(holder, f"process {os.getpid()} on {socket.gethostname()}")
            for parent in (self.root, self.steps, self.work):
                for stale in parent.glob(".tmp-*"):
                    shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
            yield
        finally:
            holder.unlink(missing_ok=True)
            lock.release()

    def folder(self, label: str, address: str) -> Path:
        """Where the output of one step lives: `steps/01-curate-3fa2c1d0`."""
        return self.steps / f"{label}-{address[:8]}"

    def finished(self, label: str, address: str, *, thorough: bool = False) -> tuple[Path | None, str | None]:
        """The valid folder of a step, or None with the reason why there is none.

        A damaged folder is moved aside to `….damaged` (never deleted, never used), so that the step is computed again.
        """
        folder = self.folder(label, address)
        reason = damage(folder, address, thorough=thorough)
        if reason is None:
            return folder, None
        if folder.exists():
            with disk_errors(folder):
                aside = folder.with_name(f"{folder.name}.damaged-{uuid.uuid4().hex[:4]}")
                folder.rename(aside)
        return None, reason

    def scratch(self, label: str, address: str) -> Path:
        """A folder that survives a kill, for checkpoints inside a step."""
        folder = self.work / f"{label}-{address[:8]}"
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        return folder

    def discard_scratch(self, label: str, address: str) -> None:
        """Remove a finished step's scratch folder."""
        shutil.rmtree(self.work / f"{label}-{address[:8]}", ignore_errors=True)

    def keep_previous_record(self, recipe_address: str) -> None:
        """Before another recipe writes run.json, keep the finished record of the one before it under its own name."""
        if not self.record_file.exists():
            return
        try:
            previous = read_json(self.record_file)
            other = previous["recipe"]["address"]
        except (StoreError, KeyError, TypeError):
            other = "damaged"
        if other != recipe_address:
            with disk_errors(self.record_file):
                self.record_file.replace(self.root / f"run.{other[:8]}.json")
