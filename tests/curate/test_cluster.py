"""Measuring on a Ray cluster of two nodes: the figures of one process, also when a worker is killed."""

from __future__ import annotations

import contextlib
import os
import signal
import threading

import numpy as np
import pytest
from safetensors.numpy import load

from residency.curate.cluster import measured
from residency.curate.measuring import EMBEDDINGS, Measurer, Wanted, Work
from residency.curate.pool import Pool
from residency.rows import Row, write
from residency.rows import load as load_rows

ray = pytest.importorskip("ray", reason="needs the extra `scale`")
pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def two_nodes():
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    cluster.wait_for_nodes()
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture
def chunks(tmp_path, monkeypatch):
    """Six chunk files, what to measure, and what one process measures."""
    monkeypatch.setattr("residency.curate.pool.CHUNK", 8)
    rng = np.random.default_rng(0)
    words = [f"w{'x' * i}" for i in range(30)]
    rows = [
        Row(id=str(i), messages=(("user", f"question {i}"), ("assistant", " ".join(rng.choice(words, 80)))), line=i)
        for i in range(45)
    ]
    pool = Pool.gather(rows, tmp_path / "pool")
    examples = tmp_path / "examples.jsonl"
    write(examples, rows[:3])
    from residency import bases

    encoder = bases.resolve("tiny-text-encoder", tmp_path).folder
    scores = (Wanted("mtld", "mtld"), Wanted("pairs", "distinct", {"n": 2}), Wanted("similarity", "similarity"))
    work = Work(scores, (EMBEDDINGS,), examples, {"encoder": encoder, "reader": encoder}, 4, "cpu", 0)
    return pool.files, work


def same(found, files, work):
    measurer = Measurer(work)
    assert sorted(found) == list(range(len(files)))
    for i, file in enumerate(files):
        expected = measurer(load_rows(file))
        mine = load(found[i])
        assert mine.keys() == expected.keys()
        for name in mine:
            np.testing.assert_array_equal(mine[name], expected[name], err_msg=name)


def test_two_nodes_measure_what_one_process_does(two_nodes, chunks):
    files, work = chunks
    assert sum(node["Alive"] for node in ray.nodes()) == 2
    same(dict(measured(files, work, 2)), files, work)
    assert ray.is_initialized(), "a cluster that was there before was shut down"


def test_a_killed_worker_is_replaced_and_its_chunk_measured_again(two_nodes, chunks):
    import psutil

    files, work = chunks

    def workers():
        lines = ((p.pid, " ".join(p.info["cmdline"] or [])) for p in psutil.process_iter(["cmdline"]))
        return {pid for pid, line in lines if "MapWorker" in line}

    killed, done, before = [], threading.Event(), workers()  # those of another test may still be there

    def kill_one():
        """The first worker that is seen."""
        while not killed and not done.wait(0.02):
            for pid in workers() - before:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)
                break

    killer = threading.Thread(target=kill_one)
    killer.start()
    try:
        found = dict(measured(files, work, 2))
    finally:
        done.set()
        killer.join()
    assert killed
    same(found, files, work)
