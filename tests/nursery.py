"""Runs a recipe again and again in forked children that are killed with SIGKILL at random moments (used by test_run.py).

Usage: nursery.py RECIPE ROOT KILLS SEED. The parent imports the libraries once and computes nothing, so that a fork costs
milliseconds and is safe. Prints one JSON object: how many kills hit, and how many runs were finished on the way.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path


def main() -> None:
    recipe_file, root, kills, seed = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    import peft  # noqa: F401
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, Trainer  # noqa: F401

    from residency import bases, recipe, report, train  # noqa: F401
    from residency.run import execute

    def child() -> int:
        pid = os.fork()
        if pid == 0:
            try:
                torch.set_num_threads(1)
                transformers.utils.logging.set_verbosity_error()
                execute(recipe.load(recipe_file), root, report=False)
                os._exit(0)
            except BaseException as error:
                sys.stderr.write(f"child failed: {type(error).__name__}: {error}\n")
                os._exit(9)
        return pid

    def whole() -> float:
        start = time.monotonic()
        _, status = os.waitpid(child(), 0)
        assert status == 0, f"uninterrupted run failed with {status}"
        return time.monotonic() - start

    length = whole()
    shutil.rmtree(root)
    rng = random.Random(seed)
    hits = finished = 0
    moments = []
    while hits < kills:
        pid = child()
        delay = rng.uniform(0.02, 0.45) * length
        end = time.monotonic() + delay
        status = None
        while time.monotonic() < end:
            done, code = os.waitpid(pid, os.WNOHANG)
            if done:
                status = code
                break
            time.sleep(0.005)
        if status is None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            hits += 1
            moments.append(round(delay, 2))
        else:
            assert status == 0, f"a resumed run failed with {status}"
            finished += 1
            shutil.rmtree(root)
    whole()
    print(json.dumps({"kills": hits, "finished": finished, "seconds": round(length, 2), "moments": moments}))


if __name__ == "__main__":
    main()
