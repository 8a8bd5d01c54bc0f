"""The report: pure, whole, robust to what is missing, and deaf to hostile text."""

from __future__ import annotations

import copy
import json
import re
from typing import Any

import pytest
from page import Page, changed
from sample import HOSTILE, PIXEL, sample_record

from residency.report import html, render_comparison, render_html, render_markdown
from residency.report.facts import Facts
from residency.report.outcome import outcome_sentence
from residency.report.sections import plainly
from residency.report.tradeoff import tradeoff


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    return sample_record()


@pytest.fixture
def light(monkeypatch):
    """Pages without the five megabytes of plotly.js, for tests that draw many."""
    monkeypatch.setattr(html, "_plotly", lambda: "/* plotly */")


def paths(value: Any, depth: int = 4) -> list[tuple]:
    """The place of everything in a record down to a depth; of what is long, the first and the last."""
    if depth == 0 or not isinstance(value, dict | list):
        return []
    entries = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
    if isinstance(value, list) or len(entries) > 40:
        entries = entries[:1] + entries[1:][-1:]
    found: list[tuple] = []
    for key, entry in entries:
        found += [(key,), *((key, *rest) for rest in paths(entry, depth - 1))]
    return found


def test_pure(record):
    before = copy.deepcopy(record)
    assert render_html(record) == render_html(copy.deepcopy(record))
    assert render_markdown(record) == render_markdown(copy.deepcopy(record))
    assert render_comparison([record, record]) == render_comparison([record, record])
    assert record == before


def test_a_record_read_back_from_json_gives_the_same_page(record, light):
    assert render_html(json.loads(json.dumps(record))) == render_html(record)


def test_well_formed(record):
    page = Page(render_html(record))
    assert page.crooked == []
    assert page.open == []
    ids = [attrs["id"] for _, attrs in page.tags if attrs.get("id")]
    assert len(ids) == len(set(ids))
    targets = [attrs["href"] for tag, attrs in page.tags if tag == "a"]
    assert {target[1:] for target in targets} <= set(ids)
    assert [tag for tag, _ in page.tags].count("h1") == 1


def test_every_cell_of_the_stages_table_is_on_the_page_and_its_twin(record, light):
    words, twin = Page(render_html(record)).words, render_markdown(record)
    stages = Facts(record).stages
    assert [stage.role for stage in stages] == ["base", "step", "step", "step", "specialist"]
    for stage in stages:
        for value in (stage.label, *stage.cells.values()):
            assert value in words
            assert value in twin


def test_stages_against_the_record_by_hand(record):
    cells = Facts(record).stages[-1].cells
    exam, change = record["exams"][3], record["comparisons"][2]
    assert (change["of"], change["against"]) == ("04-merge-heads", "00-base")
    assert cells["score"] == f"{exam['task']['value']:.2f}"[1:]
    assert cells["change"] == f"+{change['difference']:.2f}".replace("0.", ".")
    assert cells["parameters"] == "94.8 M"
    assert cells["disk"] == "190 MB"
    assert cells["kv"] == "5.12 kB"
    assert cells["speed"] == "61.8"
    assert cells["step_time"] == "38 s"


def test_sentence(record):
    said = outcome_sentence(record)
    facts = Facts(record)
    assert said.startswith(f"Task score {facts.base.cells['score']} → {facts.final.cells['score']} (+")
    assert "95 % interval +" in said
    assert "30 % fewer parameters; 1.5× tokens/s; guard " in said
    assert said.replace(" %", "\u00a0%") in render_html(record)


@pytest.mark.parametrize(
    ("low", "high", "higher", "verdict"),
    [
        (0.01, 0.2, True, "gain"),
        (-0.2, -0.01, True, "loss"),
        (-0.2, -0.01, False, "gain"),
        (0.01, 0.2, False, "loss"),
        (-0.1, 0.1, True, "unclear"),
        (0.0, 0.2, True, "unclear"),
        (None, None, True, "bare"),
    ],
)
def test_verdict(record, low, high, higher, verdict):
    copied = changed(record, ("comparisons", 2, "low"), low)
    copied["comparisons"][2]["high"] = high
    copied["task"]["higher_is_better"] = higher
    assert Facts(copied).final.change.verdict == verdict


def test_a_lower_is_better_metric_keeps_its_unit(record, light):
    copied = copy.deepcopy(record)
    copied["task"] |= {"unit": "bits/byte", "higher_is_better": False, "chance": None}
    for exam, value in zip(copied["exams"], (1.37, 1.21, 1.24, 1.25), strict=True):
        exam["task"] = {"value": value, "low": value - 0.1, "high": value + 0.1, "n": 60, "items": []}
    copied["comparisons"] = []
    assert outcome_sentence(copied).startswith("Task score 1.370 → 1.250 bits/byte (−0.120)")
    assert "(lower is better)" in json.dumps(tradeoff(Facts(copied)))
    assert "1.370" in render_html(copied)


class TestMissing:
    def test_nothing_at_all(self, light):
        page = Page(render_html({}))
        assert "unnamed run" in page.words
        assert "Nothing has been examined yet." in page.words
        assert render_markdown({}).startswith("# unnamed run")

    def test_only_a_base(self, record, light):
        copied = copy.deepcopy(record) | {"steps": [], "comparisons": [], "status": "running"}
        copied["exams"] = copied["exams"][:1]
        words = Page(render_html(copied)).words
        assert "no step has been examined yet" in words
        assert "Still running" in words
        assert "no step has been examined yet" in render_markdown(copied)

    def test_base_and_steps_without_exams(self, record, light):
        words = Page(render_html(copy.deepcopy(record) | {"exams": [], "comparisons": []})).words
        assert "Nothing has been examined yet." in words
        assert "distill · 20 layers, BiLD" in words

    @pytest.mark.parametrize("status", ["running", "failed", "interrupted", "abandoned <b>"])
    def test_unfinished(self, record, light, status):
        copied = copy.deepcopy(record) | {"status": status, "error": f"out of memory {HOSTILE}"}
        copied["steps"] = copied["steps"][:2]
        copied["exams"] = copied["exams"][:2]
        page = Page(render_html(copied))
        banners = [a["class"] for _, a in page.tags if (a.get("class") or "").startswith("banner ")]
        assert banners == ["banner banner-failed" if status == "failed" else "banner banner-open"]
        assert "out of memory" in page.words
        assert "specialist" not in page.words
        assert "out of memory" in render_markdown(copied)

    @pytest.mark.parametrize("put", [object, "text", [None, "x"], float("nan")])
    def test_any_entry_missing_or_nonsense(self, record, put):
        for path in paths(record):
            copied = changed(record, path, put)
            assert render_markdown(copied)
            assert render_comparison([copied, record])

    @pytest.mark.parametrize("put", [object, "text"])
    def test_the_page_too(self, record, light, monkeypatch, put):
        monkeypatch.setattr(html, "LONG_TEXT", 80)
        for path in paths(record, 2):
            assert Page(render_html(changed(record, path, put))).crooked == []


class TestHostile:
    def test_no_script_of_the_data_is_one(self, record):
        page = Page(render_html(record))
        assert len(page.raw["script"]) == 3  # the page's, the payload, plotly
        assert "window.__pwned=1" in page.words
        assert not any("__pwned" in source for source in (page.raw["script"][0], page.raw["script"][2]))
        assert not [attrs for _, attrs in page.tags if any(name.startswith("on") for name in attrs)]

    def test_payload_cannot_close_its_element(self, record):
        payload = Page(render_html(record)).raw["script"][1]
        assert not set("<>&\u2028\u2029") & set(payload)
        charts = json.loads(payload)["charts"]
        text = json.dumps(charts)
        assert "&lt;/script&gt;" in text
        assert "<a href" not in text

    def test_everywhere_at_once(self, record, light):
        """Every text of the record replaced by a hostile one."""

        def poison(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: poison(entry) for key, entry in value.items()}
            if isinstance(value, list):
                return [poison(entry) for entry in value]
            return f"{value}{HOSTILE}\u2028\ud800\x00" if isinstance(value, str) else value

        copied = poison(record)
        for before, after in zip(record["steps"], copied["steps"], strict=True):
            for old, new in zip(before["figures"], after["figures"], strict=True):
                new["kind"] = old["kind"]
        source = render_html(copied)
        page = Page(source)
        assert len(page.raw["script"]) == 3
        assert page.crooked == []
        assert {attrs.get("src") for tag, attrs in page.tags if tag == "img"} <= {None}
        source.encode("utf-8")
        twin = render_markdown(copied)
        outside = re.sub(r"^(`{3,}).*?^\1$", "", twin, flags=re.S | re.M)
        assert not re.search(r"(?<!\\)<", outside)
        twin.encode("utf-8")

    def test_policy_admits_the_pages_own_scripts_alone(self, record):
        source = render_html(record)
        policy = next(a["content"] for _, a in Page(source).tags if a.get("http-equiv"))
        assert "default-src 'none'" in policy
        scripts = re.search(r"script-src ([^;]*)", policy).group(1)
        assert scripts.count("sha256-") == 2
        assert "unsafe" not in scripts
        for script in Page(source).raw["script"][::2]:
            assert html._digest(script) in scripts

    def test_only_pictures_that_the_page_carries(self, record, light):
        copied = copy.deepcopy(record)
        copied["comparisons"][0]["fixed"] = ["q001", "q002", "q003"]
        copied["task"]["items"]["q003"]["image"] = "data:image/svg+xml;base64,AAAA"
        sources = [a["src"] for tag, a in Page(render_html(copied)).tags if tag == "img"]
        assert set(sources) == {PIXEL}


def test_text_is_legible_in_light_and_dark():
    """WCAG's contrast of 4.5 for every colour text is written in, on every ground it stands on."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return sum(w * v for w, v in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    for shade in (0, 1):
        for text in ("ink", "muted", "accent", "gain", "loss"):
            for ground in ("paper", "card", "cool", "wash"):
                pair = sorted(luminance(html.PALETTE[name][shade]) for name in (text, ground))
                assert (pair[1] + 0.05) / (pair[0] + 0.05) >= 4.5, (text, ground, shade)


def test_nothing_heavy_is_imported_before_it_is_needed():
    import subprocess
    import sys

    code = (
        "import residency.report, residency.report.html, sys; print({'plotly', 'jinja2', 'torch'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_facts_in_words():
    facts = {"memory_bytes": 25_276_502_016, "kv_bytes_per_token": 512, "gpu": None, "exportable": {"hf": "no"}}
    assert plainly(facts) == [("memory", "25.3 GB"), ("kv bytes per token", "512 B"), ("exportable hf", "no")]
    assert plainly(["not a mapping"]) == []


def test_what_was_reused_is_said(record, light):
    """The run's own list of what it computed decides; without one, the step's status."""
    assert [Facts(record).reused(step) for step in record["steps"]] == [True, False, False, False]
    copied = changed(record, ("time", "computed"), object)
    copied["steps"][2]["status"] = "cached"
    assert [Facts(copied).reused(step) for step in copied["steps"]] == [False, False, True, False]
    assert Page(render_html(copied)).words.count("reused from an earlier run") == 1
