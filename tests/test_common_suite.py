"""The common suite over every catalogue row, one test per check; and the suite itself must be able to fail."""

from __future__ import annotations

import pytest

from residency import catalog
from residency.testing import case_of, check_method, checks_of
from residency.testing.cases.losses import KLCase
from residency.testing.cases.selectors import KShotCase

ALL = [
    pytest.param(row.name, check, id=f"{row.name}-{check.removeprefix('check_')}")
    for row in catalog.METHODS
    for check in checks_of(case_of(row.name))
]


@pytest.mark.parametrize(("name", "check"), ALL)
def test_common_suite(name, check):
    check_method(name, only=check)


def test_a_wrong_loss_fails_it():
    class Wrong(KLCase):
        def dense(self, student, teacher):
            total, count = super().dense(student, teacher)
            return total * 1.01 + 0.1, count

    with pytest.raises(AssertionError) as error:
        check_method(Wrong())
    for check in ("reference", "fused_equals_dense", "self_is_zero"):
        assert f"kl: {check}:" in str(error.value)


def test_a_selector_that_forgets_duplicates_fails_it():
    class Wrong(KShotCase):
        def select(self, pool, examples, **params):
            return super().select(pool, examples, **params | {"near_duplicates": 1.0})

    with pytest.raises(AssertionError, match=r"reference: with \{"):
        check_method(Wrong())


def test_every_method_of_the_code_is_in_the_catalogue_and_has_a_test_file():
    import re
    from pathlib import Path

    root = Path(__file__).parent.parent
    named = {row.object.partition(":")[0] for row in catalog.METHODS}
    for module in named:
        file = root / "src" / Path(*module.split(".")).with_suffix(".py")
        assert file.exists()
        stem = file.stem
        assert list((root / "tests").rglob(f"test_{stem}.py")), f"{module} has no test file"
        assert re.search(r"arXiv|ACL|JMLR|SQuAD|20\d\d", file.read_text()), f"{module} names no source"
