"""What a bug report needs: versions and their conflicts, devices, embedded packages, disk."""

from __future__ import annotations

import importlib.metadata
import re
import sys
from typing import Any

from residency import embedded, store
from residency.errors import MissingError

OPTIONAL = ("gguf", "onnx", "onnxruntime", "onnxscript", "scikit-learn", "pillow")


def examine() -> dict[str, Any]:
    """Facts by group, and the list of problems (empty when all is well)."""
    from residency.measure import machine

    problems: list[str] = []
    facts: dict[str, dict[str, Any]] = {"core": {"python": sys.version.split()[0]}}
    for requirement in importlib.metadata.requires("residency") or []:
        if "extra ==" in requirement:
            continue
        name = re.split(r"[<>=!~ ;\[]", requirement, maxsplit=1)[0]
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            problems.append(f"{name} is not installed (needed: {requirement})")
            continue
        facts["core"][name] = found
        if not _admits(requirement, found):
            problems.append(f"{name} {found} does not satisfy {requirement}")
    facts["optional"] = {name: _version(name) for name in OPTIONAL}
    facts["embedded"] = {}
    for base, info in embedded.BASES.items():
        try:
            facts["embedded"][base] = embedded.version(info["package"])
        except MissingError as error:
            facts["embedded"][base] = f"absent ({error.hint})"
    import torch

    facts["machine"] = dict(machine())
    facts["machine"]["cuda"] = torch.version.cuda if torch.cuda.is_available() else "not available"
    facts["machine"]["cache"] = str(embedded.cache())
    free = store.free_bytes(embedded.cache())
    facts["machine"]["free disk"] = f"{free / 2**30:.1f} GiB"
    if free < 2 << 30:
        problems.append("less than 2 GiB of disk is free where the cache is; the demo needs about 1.5 GiB")
    return {"facts": facts, "problems": problems}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _admits(requirement: str, version: str) -> bool:
    from packaging.requirements import Requirement

    return Requirement(requirement.split(";")[0]).specifier.contains(version, prereleases=True)
