"""Descriptions: asked once, kept whole, and a fixed text whenever the provider fails."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from residency.adapt.descriptions import PROMPT, Description, Descriptions, clean
from residency.errors import StoreError


class Provider:
    """Answers like a model; fails for chosen labels."""

    def __init__(self, *bad):
        self.bad, self.asked = bad, []

    def __call__(self, prompt):
        self.asked.append(prompt)
        if any(b in prompt for b in self.bad):
            raise ConnectionError("no route to host")
        return f"  An answer to:\n{prompt}  "


def test_asked_once_and_kept(tmp_path):
    provider = Provider()
    made = Descriptions(tmp_path, provider, name="local/model v1")
    found = made.of(["food_food", "parking", "food_food"])
    assert list(found) == ["food_food", "parking"]
    assert provider.asked == [PROMPT.replace("{label}", "food"), PROMPT.replace("{label}", "parking")]
    assert found["parking"] == Description(f"An answer to: {provider.asked[1]}", "answer")
    assert [p.name for p in tmp_path.iterdir()] == ["local-model-v1.json"]
    silent = Provider("")
    assert Descriptions(tmp_path, silent, name="local/model v1").of(["parking"]) == {"parking": found["parking"]}
    assert Descriptions(tmp_path, None, name="local/model v1").of(["parking"])["parking"].source == "answer"
    assert silent.asked == []


def test_another_prompt_or_provider_is_asked_again(tmp_path):
    Descriptions(tmp_path, Provider(), name="a").of(["parking"])
    for keys in ({"name": "b"}, {"name": "a", "prompt": "What is {label}?"}):
        provider = Provider()
        Descriptions(tmp_path, provider, **keys).of(["parking"])
        assert len(provider.asked) == 1


def test_failures_fall_back_are_noted_and_asked_again(tmp_path):
    provider = Provider("parking")
    found = Descriptions(tmp_path, provider, name="p", given={"parking": "Where cars  stand."}).of(["parking", "decor"])
    assert found["parking"] == Description("Where cars stand.", "given", "ConnectionError: no route to host")
    assert found["decor"].source == "answer"
    kept = json.loads((tmp_path / "p.json").read_text())
    assert kept["failed"] == {"parking": "ConnectionError: no route to host"}
    assert list(kept["answers"]) == ["decor"]
    again = Descriptions(tmp_path, Provider(), name="p").of(["parking"])
    assert again["parking"].source == "answer"
    assert json.loads((tmp_path / "p.json").read_text())["failed"] == {}


@pytest.mark.parametrize(("answer", "says"), [("", "no words"), (" …! ", "no words"), (None, "NoneType"), (3, "int")])
def test_an_answer_without_words_is_none(tmp_path, answer, says):
    found = Descriptions(tmp_path, lambda prompt: answer).of(["late_fee"])["late_fee"]
    assert found.text == "It is about late fee."
    assert found.source == "template"
    assert says in found.error


def test_a_kill_loses_only_the_answer_under_way(tmp_path):
    def killed(prompt):
        if "third" in prompt:
            raise KeyboardInterrupt
        return "words"

    with pytest.raises(KeyboardInterrupt):
        Descriptions(tmp_path, killed, name="p").of(["first", "second", "third", "fourth"])
    assert list(json.loads((tmp_path / "p.json").read_text())["answers"]) == ["first", "second"]


def test_a_write_that_fails_leaves_the_old_file_whole(tmp_path, monkeypatch):
    Descriptions(tmp_path, Provider(), name="p").of(["first"])
    before = (tmp_path / "p.json").read_bytes()

    def full(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(StoreError, match="no space"):
        Descriptions(tmp_path, Provider(), name="p").of(["second"])
    assert (tmp_path / "p.json").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["p.json"]


@pytest.mark.parametrize("content", ["{", "[1]", '{"answers": 3}', '{"answers": {"a": 1}, "failed": {}}'])
def test_a_damaged_file_is_named(tmp_path, content):
    (tmp_path / "p.json").write_text(content)
    with pytest.raises(StoreError, match=r"p\.json"):
        Descriptions(tmp_path, Provider(), name="p").of(["a"])


def test_names_cannot_leave_the_folder(tmp_path):
    inner = tmp_path / "inner"
    for name in ("../../escaped", "..", "", "a/../b", "ß"):
        Descriptions(inner, Provider(), name=name).of(["a"])
    assert [p.name for p in tmp_path.iterdir()] == ["inner"]
    assert all(p.parent == inner and p.suffix == ".json" for p in inner.iterdir())


def test_without_folder_or_provider():
    assert Descriptions().of(["a_b"]) == {"a_b": Description("It is about a b.", "template")}
    assert Descriptions(ask=Provider()).of(["a"])["a"].source == "answer"
    assert Descriptions().of([]) == {}
    with pytest.raises(ValueError, match="does not say"):
        Descriptions(prompt="Describe it.")


def test_answers_are_cut_where_a_sentence_ends():
    assert clean("One. Two is longer. Three", 21) == "One. Two is longer."
    assert clean("One. Two is longer. Three", 19) == "One. Two is longer."
    assert clean("no sentence ends here", 12) == "no sentence"
    assert clean("a\n\n b\tc", 50) == "a b c"
    assert clean("lone \ud800 surrogate", 50) == "lone ? surrogate"
    assert clean("Version 3.5 is here", 10) == "Version"
