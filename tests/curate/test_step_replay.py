"""The `replay` step in a recipe: two and three tasks, and what the report draws of them."""

from __future__ import annotations

import pytest

from helpers import qa, write_jsonl
from residency import recipe, rows, run, store
from residency.errors import DataError, PlanError
from residency.report.facts import Facts
from residency.report.groups import by_tag

RECIPE = """\
residency: 1
name: sequence
base: tiny-llama
task: {{examples: data/first.jsonl, test: data/test.jsonl, metric: choice-accuracy}}
steps:
  - tune: {{method: lora, rank: 2, max-steps: 2, batch: 4}}
  - replay: {{next: data/second.jsonl, per-task: 5, encoder: tiny-text-encoder{more}}}
  - tune: {{method: lora, rank: 2, max-steps: 2, batch: 4}}
  - replay: {{next: data/third.jsonl, seen: [data/first.jsonl, data/second.jsonl], per-task: 4,
      encoder: tiny-text-encoder}}
  - tune: {{method: lora, rank: 2, max-steps: 2, batch: 4}}
  - evaluate: {{speed: false}}
"""


@pytest.fixture
def tasks(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for name, topic, n in (("first", "permit", 12), ("second", "music", 9), ("third", "river", 7)):
        write_jsonl(data / f"{name}.jsonl", [qa(i, topic) | {"category": topic} for i in range(n)])
    write_jsonl(
        data / "test.jsonl",
        [qa(i, t) | {"category": t} for t in ("permit", "music", "river") for i in range(100, 104)],
    )
    return tmp_path


def go(folder, more=""):
    (folder / "recipe.yaml").write_text(RECIPE.format(more=more))
    record = run.execute(recipe.load(folder / "recipe.yaml"), folder / "run")
    steps = [s for s in record["steps"] if s["step"] == "replay"]
    return (
        record,
        steps,
        [rows.load(store.RunStore(folder / "run").folder(s["id"], s["address"]) / "rows.jsonl") for s in steps],
    )


def test_three_tasks_in_a_row(tasks):
    record, steps, written = go(tasks)
    assert [s["summary"]["replayed"] for s in steps] == [5, 8]
    topics = [[r.id.split("-")[0] for r in part] for part in written]
    assert topics[0] == ["music"] * 9 + ["permit"] * 5
    assert topics[1][:7] == ["river"] * 7
    assert sorted(steps[1]["quotas"]) == ["first", "second"]
    assert sum(steps[1]["quotas"].values()) == 8
    assert topics[1][7:].count("permit") == steps[1]["quotas"]["first"]
    assert steps[1]["distances"]["first"] > 0
    figure = by_tag(Facts(record))
    assert [s["name"] for s in figure["series"]] == ["music", "permit", "river"]
    assert all(len(s["x"]) == 4 for s in figure["series"])
    exam = record["exams"][1]["task"]["items"]
    own = [item["score"] for item in exam if item["id"].startswith("river")]
    assert figure["series"][2]["y"][1] == pytest.approx(sum(own) / len(own))


def test_equal_quotas_and_other_seeds(tasks):
    _, steps, written = go(tasks, ", quota: equal, rows: random, seed: 3")
    _, _, other = go(tasks, ", quota: equal, rows: random, seed: 4")
    assert steps[0]["summary"]["solver"] == "equal quotas"
    assert {r.id for r in written[0]} != {r.id for r in other[0]}


def test_a_task_named_twice_is_refused(tasks):
    (tasks / "recipe.yaml").write_text(
        RECIPE.format(more="").replace("seen: [data/first.jsonl, data/second.jsonl]", "seen: [data/third.jsonl]")
    )
    with pytest.raises(PlanError, match="names a task twice"):
        run.execute(recipe.load(tasks / "recipe.yaml"), tasks / "run")


def test_rows_of_two_tasks_are_replayed_once_and_a_task_without_rows_is_refused(tasks):
    some = "\n".join((tasks / "data" / "first.jsonl").read_text().splitlines()[:4]) + "\n"
    (tasks / "data" / "second.jsonl").write_text(some + (tasks / "data" / "second.jsonl").read_text())
    _, steps, written = go(tasks)
    assert [s["summary"]["same_in_two_tasks"] for s in steps] == [4, 4]
    ids = [r.key() for r in written[1]]
    assert len(ids) == len(set(ids))
    with pytest.raises(DataError, match="every row learnt before"):
        (tasks / "data" / "second.jsonl").write_text((tasks / "data" / "first.jsonl").read_text())
        go(tasks)
