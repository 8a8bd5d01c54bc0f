"""The Markdown twin, the comparison of runs, and the numbers both are written in."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
from page import changed
from sample import sample_record

from residency.report import formats as fmt
from residency.report import render_comparison, render_markdown
from residency.report.markdown import fence, safe


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    return sample_record()


class TestMarkdown:
    def test_tables_are_well_formed(self, record):
        blocks: list[list[str]] = [[]]
        for line in render_markdown(record).splitlines():
            if line.startswith("|"):
                blocks[-1].append(line)
            elif blocks[-1]:
                blocks.append([])
        tables = [block for block in blocks if block]
        assert len(tables) > 15
        for block in tables:
            widths = {len(re.findall(r"(?<!\\)\|", line)) for line in block}
            assert len(widths) == 1, block[0]
            assert set(block[1]) <= set("|- ")

    def test_a_pipe_in_text_opens_no_cell(self, record):
        assert r"\| pipe \`tick\`" in safe("| pipe `tick`")

    def test_the_fence_is_longer_than_any_in_the_recipe(self, record):
        assert fence("````\nx", "yaml").startswith("`````yaml\n")

    def test_as_much_as_the_page(self, record):
        twin = render_markdown(record)
        for text in ("The pool as a map", "812 points", "the first 20 of 812 rows", "general-knowledge"):
            assert text in twin
        assert record["data"]["pool"]["sha256"] in twin
        assert record["recipe"]["text"].strip() in twin


class TestCompare:
    def test_side_by_side(self, record):
        other = copy.deepcopy(record) | {"name": "smaller | run", "seed": 8}
        other["exams"] = other["exams"][:2]
        other["recipe"]["resolved"]["steps"][1] = {"tune": {"rank": 8}}
        text = render_comparison([record, other])
        assert r"smaller \| run" in text
        assert "do not compare" not in text
        assert re.search(r"steps\.2\.tune\.rank +\| — +\| 8", text)
        assert re.search(r"seed +\| 7 +\| 8", text)
        assert re.search(r"parameters +\| 94.8 M +\| 134.5 M", text)

    def test_paired_over_the_same_items(self, record):
        other = changed(record, ("exams", 3, "task", "items"), copy.deepcopy(record["exams"][1]["task"]["items"]))
        mine = {i["id"]: i["score"] for i in record["exams"][3]["task"]["items"]}
        theirs = {i["id"]: i["score"] for i in record["exams"][1]["task"]["items"]}
        better = sum(theirs[i] > mine[i] for i in mine)
        worse = sum(theirs[i] < mine[i] for i in mine)
        text = render_comparison([record, other | {"name": "other"}])
        assert re.search(rf"other +\| 60 +\| {better} +\| {worse} +\|", text)

    def test_other_test_rows_are_a_warning(self, record):
        other = changed(record, ("data", "test", "sha256"), "e5" * 32)
        text = render_comparison([record, other])
        assert "Scores do not compare:** the runs differ in their test rows." in text
        assert "Item by item" not in text

    def test_one_run_is_no_comparison(self, record):
        with pytest.raises(ValueError, match="two runs or more, not 1"):
            render_comparison([record])


class TestFormats:
    @pytest.mark.parametrize(
        ("write", "value", "text"),
        [
            (fmt.count, 134_515_008, "134.5 M"),
            (fmt.count, 1_236_000_000, "1.24 B"),
            (fmt.count, 9832, "9,832"),
            (fmt.count, True, "—"),
            (fmt.size, 768, "768 B"),
            (fmt.size, 23_040, "23.0 kB"),
            (fmt.size, 1_240_000_000, "1.24 GB"),
            (fmt.size, "big", "—"),
            (fmt.duration, 0.42, "0.4 s"),
            (fmt.duration, 59.7, "1 min 00 s"),
            (fmt.duration, 7500, "2 h 05 min"),
            (fmt.measure, float("inf"), "—"),
            (fmt.measure, 0.01234, "0.0123"),
            (fmt.plain, [1, None, True], "1, —, yes"),
        ],
    )
    def test_numbers(self, write, value, text):
        assert write(value) == text

    def test_shares(self):
        scale = fmt.Scale()
        assert [scale.text(v) for v in (0.724, 1.0, 0, None)] == [".72", "1.00", ".00", "—"]
        assert [scale.signed(v) for v in (0.18, -0.01, 0.0, -0.004, 1e-9)] == ["+.18", "−.01", "±.00", "−.004", "±.00"]
        assert scale.span(0.08, 0.28, signed=True) == "+.08…+.28"
        assert fmt.Scale.of({}, [0.5], n=1000).text(0.7245) in (".724", ".725")
