"""Recipes: what reads well, and a clear, placed message for everything that does not."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import ROOT, TINY_RECIPE
from residency import catalog, recipe
from residency.errors import RecipeError, ResidencyError

MINIMAL = "residency: 1\nname: x\nbase: tiny-llama\ntask: {examples: a.jsonl, test: b.jsonl}\nsteps:\n  - tune: {}\n"


def fails(text):
    with pytest.raises(RecipeError) as error:
        recipe.parse(text)
    return str(error.value)


def test_a_recipe_reads_with_its_defaults():
    r = recipe.parse(MINIMAL)
    assert r.keys.seed == 0
    assert r.steps[0].params["method"] == "lora"
    assert r.steps[0].params["rank"] == 16
    assert r.resolved()["task"]["metric"] == "choice-accuracy"


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("tune: {}", "tune: {rnak: 3}", ["recipe.yaml:6:12", "`rnak`", "did you mean `rank`"]),
        ("tune: {}", "tune: {methud: lora}", ["did you mean `method`"]),
        ("tune: {}", "tune: {method: lorra}", ["did you mean `lora`"]),
        ("tune: {}", "tuen: {}", ["unknown step `tuen`", "did you mean `tune`"]),
        ("tune: {}", "tune: {rank: 0}", ["`rank`", "greater than or equal to 1", "'0'"]),
        ("tune: {}", "tune: {rank: many}", ["`rank`", "'many'"]),
        ("tune: {}", "tune: [1]", ["are a mapping"]),
        ("  - tune: {}", "  - {tune: {}, distill: {}}", ["each step is one key"]),
        ("  - tune: {}", "  []", ["`steps` is empty"]),
        ("  - tune: {}", "  - distill: {student: {layer: 3}}", ["6:25", "did you mean `layers`"]),
        ("  - tune: {}", "  - distill: {student: {layers: 3, base: x}}", ["either `base`, or what to keep"]),
        ("  - tune: {}", "  - distill: {loss: kl, k: 9, student: {layers: 3}}", ["unknown key `k`"]),
        ("name: x", "nmae: x", ["`nmae`", "did you mean `name`", "`name` is missing"]),
        ("name: x", "name: ../x", ["`name`"]),
        ("residency: 1", "residency: 2", ["`residency`"]),
        ("test: b.jsonl", "test: b.jsonl, metric: accuracy", ["did you mean `choice-accuracy`"]),
        ("base: tiny-llama", "base: tiny-llama\nbase: other", ["4:1", "stands here twice"]),
        ("base: tiny-llama", "base: [unclosed", ["not YAML"]),
        ("base: tiny-llama", "base: tiny-llama\n\tseed: 1", ["not YAML"]),
        ("base: tiny-llama", "seed: -1\nbase: tiny-llama", ["`seed`"]),
        ("base: tiny-llama", "1: 2\nbase: tiny-llama", ["a key is a word"]),
    ],
)
def test_mistakes_are_answered_with_place_and_nearest_key(old, new, expected):
    message = fails(MINIMAL.replace(old, new))
    assert message.startswith("recipe.yaml:")
    for part in expected:
        assert part in message


def test_all_mistakes_of_a_section_are_shown_at_once():
    message = fails(MINIMAL.replace("tune: {}", "tune: {rank: 0, epoch: 2}"))
    assert "`rank`" in message
    assert "did you mean `epochs`" in message


@pytest.mark.parametrize(
    "text", ["", "- a\n", "just words", "&a [*a]", "a: &a {b: *a}", "\x00", "residency: 1", "[" * 5000]
)
def test_what_is_no_recipe_is_said_so(text):
    assert "recipe.yaml" in fails(text)


def test_numbers_in_scientific_notation_and_dates_stay_what_they_look_like():
    r = recipe.parse(MINIMAL.replace("tune: {}", "tune: {learning-rate: 5e-4}").replace("name: x", "name: 2026-01-02"))
    assert r.steps[0].params["learning-rate"] == 5e-4
    assert r.keys.name == "2026-01-02"


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(RecipeError, match="no such recipe"):
        recipe.load(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"name: x\n# caf\xe9\n")
    with pytest.raises(RecipeError, match=r"latin.yaml:2.*UTF-8"):
        recipe.load(tmp_path / "latin.yaml")
    (tmp_path / "big.yaml").write_bytes(b"#" * (recipe.MAX_BYTES + 1))
    with pytest.raises(RecipeError, match="at most"):
        recipe.load(tmp_path / "big.yaml")
    with pytest.raises(RecipeError):
        recipe.load(tmp_path)


FRAGMENTS = [
    "residency: 1",
    "name: x",
    "base: tiny-llama",
    "task:",
    "  examples: a",
    "  test: b",
    "steps:",
    "  - tune: {}",
    "  - evaluate",
    "  - distill: {student: {layers: 2}}",
    "{",
    "}",
    "[",
    "- ",
    ": ",
    "? ",
    "&a ",
    "*a",
    "!!python/object:os.system",
    "|",
    ">",
    "\t",
    "'",
    '"',
    "---",
    "null",
    "1e999",
    ".nan",
    "0x",
    "2026-01-01",
    "ü",
    "\u2028",
    "limit: {pool: 3}",
    "guard: g",
]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.text(max_size=12)), max_size=14),
    st.sampled_from(["\n", "\n  ", " "]),
)
def test_no_malformed_recipe_gives_a_traceback(parts, separator):
    """200 malformed recipes: a Recipe, or a RecipeError that names the file and a place."""
    try:
        recipe.parse(separator.join(parts))
    except RecipeError as error:
        assert str(error).startswith("recipe.yaml")


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 4))
def test_no_mutated_good_recipe_gives_a_traceback(seed, edits):
    """A good recipe with characters changed, dropped, doubled: read or refused with its place."""
    rng, text = random.Random(seed), TINY_RECIPE
    for _ in range(edits):
        at = rng.randrange(len(text))
        text = rng.choice(
            [
                text[:at] + text[at + 1 :],
                text[:at] + rng.choice("{}[]:,-&*!|>'\"%@ \n\tx0") + text[at:],
                text[:at] + text[at : at + 9] + text[at:],
            ]
        )
    try:
        recipe.parse(text)
    except RecipeError as error:
        assert str(error).startswith("recipe.yaml:")


def test_every_step_key_reaches_the_address(project):
    """No key is accepted and then ignored by the plan: changing any of them changes the step's address."""
    from residency import plan

    text = project.read_text()
    before = [n.address for n in plan.make(recipe.load(project)).nodes]
    for old, new in (
        ("keep: 12", "keep: 11"),
        ("rank: 2", "rank: 3"),
        ("calibrate: 4", "calibrate: 5"),
        ("layers: 3", "layers: 2"),
        ("new-tokens: 2", "new-tokens: 3"),
        ("name: small", "name: small\nseed: 5"),
        ("name: small", "name: small\nmax-chars: 100"),
    ):
        project.write_text(text.replace(old, new))
        assert [n.address for n in plan.make(recipe.load(project)).nodes] != before, new


def test_reading_a_recipe_imports_nothing_heavy():
    code = "import sys; from residency import recipe; recipe.load(sys.argv[1]).tiny(); print([m for m in ('torch', 'transformers', 'peft', 'datasets', 'plotly') if m in sys.modules])"
    for file in sorted((ROOT / "recipes").glob("*.yaml")):
        out = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=True).stdout
        assert out.strip() == "[]"


def test_shipped_recipes_read_and_name_only_known_things(recipes):
    files = sorted(recipes.glob("*.yaml"))
    assert files
    for file in files:
        assert recipe.load(file).keys.description


def test_catalogue_points_at_what_exists():
    for row in catalog.METHODS:
        assert row.load() is not None
    with pytest.raises(ResidencyError, match="did you mean `bild`"):
        catalog.method("bidl")
