"""Figures and items: what plotly gets, and what a page does with a figure it cannot draw."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from page import Page, changed
from sample import sample_record

from residency.report import figures, html, render_html, render_markdown
from residency.report.facts import Facts
from residency.report.items import flips, strip
from residency.report.tradeoff import tradeoff


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    return sample_record()


@pytest.fixture
def light(monkeypatch):
    """Pages without the five megabytes of plotly.js, for tests that draw many."""
    monkeypatch.setattr(html, "_plotly", lambda: "/* plotly */")


class TestFigures:
    def specs(self, record) -> list[dict[str, Any]]:
        return [spec for step in record["steps"] for spec in step["figures"]]

    def test_plotly_accepts_every_chart(self, record):
        """The library's own validation, which the page does without."""
        from plotly.graph_objects import Figure

        drawn = [spec for spec in self.specs(record) if spec["kind"] in figures.CHARTS]
        assert {spec["kind"] for spec in drawn} == set(figures.CHARTS)
        for spec in drawn:
            Figure(figures.draw(spec))
        for variant in tradeoff(Facts(record)):
            Figure(data=variant["data"], layout=variant["layout"])

    def test_points_survive(self, record):
        scatter = next(spec for spec in self.specs(record) if spec["kind"] == "scatter")
        traces = figures.draw(scatter)["data"]
        assert sum(len(trace["x"]) for trace in traces) == len(scatter["x"])
        assert [trace["name"] for trace in traces] == list(dict.fromkeys(scatter["group"]))

    def test_bars_stand_in_the_order_given_and_keep_their_width(self):
        spec = {"kind": "bars", "title": "", "x": ["0", "1", "2"], "y": [1, 2, 3], "group": ["b", "a", "b"]}
        layout = figures.draw(spec)["layout"]
        assert layout["xaxis"]["categoryarray"] == ["0", "1", "2"]
        assert layout["barmode"] == "overlay"
        assert figures.draw(spec | {"x": ["0", "0", "1"]})["layout"]["barmode"] == "group"

    def test_labels_that_repeat_stand_apart(self):
        spec = {"kind": "heatmap", "title": "", "x": ["the", "the"], "y": ["a", "b"], "z": [[1, 2], [3, 4]]}
        figure = figures.draw(spec)
        assert figure["data"][0]["x"] == [0, 1]
        assert figure["layout"]["xaxis"]["ticktext"] == ["the", "the"]

    @pytest.mark.parametrize(
        "spec",
        [
            {},
            {"kind": "hologram", "title": "No such thing"},
            {"kind": ["lines"], "title": 3},
            {"kind": "lines", "title": "None"},
            {"kind": "lines", "title": "Odd", "series": [{"y": "abc"}, 3]},
            {"kind": "bars", "x": [[1], {"a": 2}], "y": [float("inf"), "x"], "group": [None, {}]},
            {"kind": "scatter", "x": [1, None, "a"], "y": [2, float("nan")], "hover": [None]},
            {"kind": "heatmap", "x": [1], "y": [], "z": [3, [1, None], []]},
            {"kind": "table", "columns": None, "rows": [1, "x", [None], {"a": 1}]},
            {"kind": "gallery", "items": [3, {"image": 4}, {"image": "javascript:alert(1)", "title": None}]},
            {"kind": "gallery", "items": "none"},
        ],
    )
    def test_no_figure_breaks_the_page(self, record, light, spec):
        copied = copy.deepcopy(record)
        copied["steps"][0]["figures"] = [spec]
        page = Page(render_html(copied))
        assert page.crooked == []
        json.loads(page.raw["script"][1], parse_constant=lambda name: pytest.fail(name))
        assert render_markdown(copied)

    def test_an_unknown_kind_is_named(self, record, light):
        for text in (Page(render_html(record)).words, render_markdown(record)):
            assert "A figure kind from the future" in text
            assert "cannot draw this figure kind: hologram" in text

    def test_a_gallery_shows_its_pictures_and_no_others(self, record, light):
        from sample import PIXEL

        copied = copy.deepcopy(record)
        pictures = [{"image": PIXEL, "title": "kept", "text": "as given"}, {"image": "http://a/b.png", "title": "gone"}]
        copied["steps"][0]["figures"] = [{"kind": "gallery", "title": "Rows", "items": pictures}]
        copied["steps"][3]["figures"] = []
        copied["comparisons"] = []
        page = Page(render_html(copied))
        assert [a["src"] for tag, a in page.tags if tag == "img"] == [PIXEL]
        assert "kept" in page.words
        assert "as given" in page.words
        assert "2 pictures" in render_markdown(copied)

    def test_long_tables_say_how_long(self, record, light):
        page = Page(render_html(record))
        assert "The first 200 of 812 rows" in page.words
        payload = json.loads(page.raw["script"][1])
        assert [len(rows) for rows in payload["tables"].values()] == [812]


class TestItems:
    def test_flips_carry_their_text(self, record, light):
        change = Facts(record).change("02-tune", "00-base")
        found = flips(Facts(record), change)
        assert [flip.id for flip in found.fixed] == record["comparisons"][0]["fixed"]
        first = found.fixed[0]
        assert first.after == first.answer != first.before
        words = Page(render_html(record)).words
        assert f"Fixed {len(found.fixed)}" in words
        for flip in found.fixed + found.broken:
            assert " ".join(flip.prompt.split()) in words

    def test_more_than_can_be_shown(self, record, light):
        copied = changed(record, ("comparisons", 0, "fixed"), [f"x{i}" for i in range(1000)])
        assert "Fixed 1000" in Page(render_html(copied)).words
        assert "800 more are in run.json." in render_markdown(copied)

    def test_strip_counts_what_the_exam_counted(self, record):
        rows = strip(Facts(record)).rows
        for exam, (_, _, cells) in zip(record["exams"], rows, strict=True):
            assert sum(cells) == sum(item["score"] for item in exam["task"]["items"])

    def test_no_strip_of_scores_that_are_not_shares(self, record):
        assert strip(Facts(changed(record, ("exams", 0, "task", "items", 0, "score"), 3.2))) is None


def test_two_heatmaps_can_share_a_scale():
    spec = {"kind": "heatmap", "title": "t", "x": ["a"], "y": ["b"], "z": [[0.4]]}
    assert "zmin" not in figures.draw(spec)["data"][0]
    trace = figures.draw(spec | {"range": [0.0, 1.0]})["data"][0]
    assert (trace["zmin"], trace["zmax"]) == (0.0, 1.0)
    assert "zmin" not in figures.draw(spec | {"range": [0.0, None]})["data"][0]
