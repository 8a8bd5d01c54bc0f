"""Valid or absent: atomic files and folders, damage found, disk faults said, one process at a time."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import textwrap

import pytest

from residency import store
from residency.errors import StoreError

A = "a" * 64


def make(folder, address=A, text="hello"):
    with store.sealed(folder, address) as out:
        (out / "model").mkdir()
        (out / "model" / "w.bin").write_text(text * 100)
        (out / "rows.jsonl").write_text(text)
    return folder


def test_a_sealed_folder_is_whole(tmp_path):
    folder = make(tmp_path / "steps" / "01-x")
    assert store.damage(folder, A) is None
    assert store.damage(folder, A, thorough=True) is None
    assert store.damage(folder, "b" * 64) == "the manifest belongs to another step"
    assert store.damage(tmp_path / "none") == "absent"


def test_an_error_inside_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), store.sealed(tmp_path / "s", A) as out:
        (out / "a").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda f: (f / "model" / "w.bin").write_text("short"), "bytes instead of"),
        (lambda f: (f / "model" / "w.bin").write_text("HELLO" * 100), "other content"),
        (lambda f: (f / "rows.jsonl").unlink(), "rows.jsonl is missing"),
        (lambda f: (f / store.MANIFEST).write_text("{"), "manifest is damaged"),
        (lambda f: (f / store.MANIFEST).write_text("[]"), "manifest is damaged"),
        (
            lambda f: (f / store.MANIFEST).write_text('{"files": {"rows.jsonl": 3}, "address": 1}'),
            "manifest is damaged",
        ),
        (lambda f: (f / store.MANIFEST).write_bytes(b"\xff\xfe"), "manifest is damaged"),
        (lambda f: (f / store.MANIFEST).unlink(), "manifest is damaged"),
    ],
)
def test_every_damage_is_found_and_the_folder_set_aside(tmp_path, harm, says):
    run = store.RunStore(tmp_path)
    folder = make(run.folder("01-x", A))
    harm(folder)
    found, reason = run.finished("01-x", A)
    assert found is None
    assert says in reason
    assert not folder.exists()
    assert len(list(run.steps.glob("*.damaged-*"))) == 1
    assert run.finished("01-x", A) == (None, "absent")


def test_content_changed_with_size_and_date_kept_needs_the_thorough_look(tmp_path):
    folder = make(tmp_path / "x")
    file = folder / "rows.jsonl"
    stat = file.stat()
    file.write_text("jello")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert store.damage(folder, A) is None  # documented: as git does
    assert "other content" in store.damage(folder, A, thorough=True)


def test_atomic_text_keeps_the_old_content_when_writing_fails(tmp_path, monkeypatch):
    file = tmp_path / "run.json"
    store.write_json(file, {"a": 1})
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(StoreError, match=r"no space left.*MiB free") as error:
        store.write_json(file, {"a": 2})
    assert "--out" in str(error.value)
    assert json.loads(file.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "x"),
        OSError(errno.EDQUOT, "x"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("wrapped"),
    ],
)
def test_a_full_disk_is_recognised_however_it_is_wrapped(tmp_path, error):
    if str(error) == "wrapped":
        error.__cause__ = OSError(errno.ENOSPC, "x")
    assert "no space left" in str(store.disk_fault(error, tmp_path))
    assert store.disk_fault(ValueError("other"), tmp_path) is None


def test_a_real_full_disk(tmp_path):
    """A 2 MiB file system, where the machine lets us mount one; elsewhere the injected faults above have to do."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        with pytest.raises(StoreError, match="no space left"), store.sealed(disk / "steps" / "x", A) as out:
            (out / "big").write_bytes(b"x" * (4 << 20))
        assert not list((disk / "steps").iterdir())
        torch = pytest.importorskip("torch")
        from safetensors.torch import save_file

        with pytest.raises(StoreError, match="no space left"), store.sealed(disk / "steps" / "y", A) as out:
            save_file({"a": torch.zeros(1 << 20)}, out / "w.safetensors")
        assert not list((disk / "steps").iterdir())
        make(disk / "steps" / "small")
    finally:
        subprocess.run(["umount", str(disk)], check=False)


def test_a_folder_that_may_not_be_written(tmp_path, monkeypatch):
    fault = store.disk_fault(PermissionError(errno.EACCES, "no", "/x/run.json"), tmp_path)
    assert "/x/run.json" in str(fault)
    assert "permissions" in str(fault)


def test_a_second_process_is_told_who_holds_the_run(tmp_path):
    code = """
        import sys
        from pathlib import Path
        from residency import store
        with store.RunStore(Path(sys.argv[1])).locked():
            print("held", flush=True)
            sys.stdin.read()
    """
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stdout.readline() == "held\n"
        with pytest.raises(StoreError, match=f"in use by process {child.pid}"), store.RunStore(tmp_path).locked():
            pass
        child.kill()  # the lock dies with its process, even a killed one
        child.wait()
        with store.RunStore(tmp_path).locked():
            pass
    finally:
        child.kill()
        child.stdin.close()
        child.stdout.close()


def test_leftovers_of_a_killed_process_are_swept(tmp_path):
    run = store.RunStore(tmp_path)
    (run.steps / ".tmp-1234-01-x").mkdir(parents=True)
    (tmp_path / ".tmp-5678-run.json").write_text("half")
    with run.locked():
        assert not list(run.steps.iterdir())
        assert not list(tmp_path.glob(".tmp-*"))


def test_another_recipes_record_is_kept_under_its_own_name(tmp_path):
    run = store.RunStore(tmp_path)
    store.write_json(run.record_file, {"recipe": {"address": "f" * 64}})
    run.keep_previous_record("f" * 64)
    assert run.record_file.exists()
    run.keep_previous_record("e" * 64)
    assert not run.record_file.exists()
    assert (tmp_path / "run.ffffffff.json").exists()


def test_addresses_do_not_depend_on_key_order_and_refuse_nan():
    assert store.address_of({"a": 1, "b": [2.5, "ü"]}) == store.address_of({"b": [2.5, "ü"], "a": 1})
    assert store.address_of({"a": 1}) != store.address_of({"a": 1.5})
    with pytest.raises(ValueError, match="JSON"):
        store.address_of(float("nan"))


def test_timeless_leaves_out_what_differs_from_run_to_run():
    record = {"time": 1, "steps": [{"measured": {"s": 1}, "summary": {"time_budget": 3}}], "a": {"measured": 2, "b": 1}}
    assert store.timeless(record) == {"steps": [{"summary": {"time_budget": 3}}], "a": {"b": 1}}


def test_linked_folders_share_bytes_and_copies_do_not(tmp_path, monkeypatch):
    source = tmp_path / "model"
    (source / "draft").mkdir(parents=True)
    (source / "w.bin").write_text("weights")
    (source / "draft" / "w.bin").write_text("small")
    (source / ".hidden").write_text("x")
    (source / "alias.bin").symlink_to(source / "w.bin")
    store.link_folder(source, tmp_path / "linked")
    assert sorted(str(p.relative_to(tmp_path / "linked")) for p in (tmp_path / "linked").rglob("*") if p.is_file()) == [
        "alias.bin",
        "draft/w.bin",
        "w.bin",
    ]
    assert (tmp_path / "linked" / "w.bin").stat().st_ino == (source / "w.bin").stat().st_ino
    assert not (tmp_path / "linked" / "alias.bin").is_symlink()

    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "across file systems")

    monkeypatch.setattr(os, "link", refuse)
    store.link_folder(source, tmp_path / "copied")
    assert (tmp_path / "copied" / "w.bin").stat().st_ino != (source / "w.bin").stat().st_ino
    assert (tmp_path / "copied" / "draft" / "w.bin").read_text() == "small"
    with pytest.raises(StoreError, match="cannot be written"):
        store.link_folder(source, tmp_path / "copied")
