"""Peak memory against blocks of known size, nested, sampled and in a thread; the machine; the clock."""

import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from residency import measure
from residency.measure import PeakMemory, cpu_gflops, machine, resident

MB = 2**20


def touch(megabytes):
    """Allocate, write and free."""
    block = np.ones(megabytes * MB // 8)
    return float(block[-1])


def test_sees_a_block_that_is_gone_at_the_end():
    with PeakMemory() as peak:
        touch(200)
    assert 190 * MB < peak.rise < 260 * MB
    assert peak.bytes >= resident()


def test_an_earlier_peak_does_not_count():
    touch(300)
    with PeakMemory() as peak:
        touch(20)
    if not peak.exact:
        pytest.skip("this kernel does not lower the mark")
    assert peak.rise < 100 * MB


def test_nested_blocks_see_their_own_peaks():
    with PeakMemory() as outer:
        touch(240)
        with PeakMemory() as inner:
            touch(80)
        assert inner.rise < 150 * MB
    assert outer.rise > 230 * MB
    with PeakMemory() as outer, PeakMemory() as inner:
        touch(150)
    assert inner.rise > 140 * MB
    assert outer.rise > 140 * MB
    assert measure._open == []


def test_sampling_where_the_kernel_does_not_help(monkeypatch):
    monkeypatch.setattr(measure, "_lower_mark", lambda: False)
    threads = threading.active_count()
    with PeakMemory() as peak:
        block = np.ones(150 * MB // 8)
        time.sleep(0.05)
        del block
    assert not peak.exact
    assert 140 * MB < peak.rise < 220 * MB
    assert threading.active_count() == threads


def test_without_proc_psutil_tells(monkeypatch, tmp_path):
    psutil = pytest.importorskip("psutil")
    monkeypatch.setattr(measure, "_STATUS", tmp_path / "none")
    monkeypatch.setattr(measure, "_CLEAR", tmp_path)
    assert abs(resident() - psutil.Process().memory_info().rss) < 50 * MB
    with PeakMemory() as peak:
        block = np.ones(100 * MB // 8)
        time.sleep(0.05)
        del block
    assert not peak.exact
    assert peak.rise > 90 * MB


def test_an_error_in_the_block_leaves_nothing_behind():
    with pytest.raises(RuntimeError), PeakMemory() as peak:
        raise RuntimeError
    assert peak.bytes > 0
    assert measure._open == []


def test_sees_what_native_code_allocates():
    torch = pytest.importorskip("torch")
    with PeakMemory() as peak:
        torch.ones(150 * MB // 4).sum()
    assert peak.rise > 140 * MB
    assert (peak.cuda_bytes is None) == (not torch.cuda.is_initialized())


def test_machine():
    found = machine()
    assert found["cpu"]
    assert found["cores"] >= 1
    assert found["memory_bytes"] > resident()
    assert found["device"] in ("cpu", "cuda")


def test_gflops_is_the_speed_of_a_product():
    first = cpu_gflops()
    assert first == cpu_gflops()
    a = np.ones((768, 768), dtype=np.float32)
    a @ a
    begin = time.perf_counter()
    a @ a
    here = 2 * 768**3 / (time.perf_counter() - begin) / 1e9
    assert first > here / 10
    assert first < 1e5


def test_importing_does_not_import_torch():
    code = "import sys, residency.measure, residency.stats; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_released_memory_goes_back_to_the_system():
    from residency.measure import release, resident

    before = resident()
    held = [bytes(4000 + i % 97) for i in range(50_000)]
    grown = resident()
    assert grown > before + (100 << 20)
    del held
    release()
    assert resident() < before + (60 << 20)
