"""`residency augment`: from file to file, whole or not at all."""

from __future__ import annotations

import json

import pytest

from helpers import write_jsonl
from residency.cli import app
from residency.curate.spanfile import augment_file
from residency.curate.spans import SpanReplace
from residency.errors import DataError

ROWS = [
    {"id": 1, "text": "i want thai food in the north", "spans": [{"slot": "food", "start": 7, "end": 11}]},
    {"id": 2, "text": "anything is fine", "spans": []},
    {"id": 3, "text": "north", "spans": [{"slot": "area", "start": 0, "end": 5, "value": "north"}]},
]


def test_rows_stay_and_copies_say_what_they_are(tmp_path):
    source = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    done = augment_file(source, tmp_path / "more.jsonl", SpanReplace(copies=2))
    lines = [json.loads(line) for line in (tmp_path / "more.jsonl").read_text().splitlines()]
    assert lines[:3] == ROWS
    assert [line["copy_of"] for line in lines[3:]] == [1, 3, 1, 3]
    for line in lines[3:]:
        for span in line["spans"]:
            assert line["text"][span["start"] : span["end"]] in line["replaced"].values()
        assert not {"thai"} & set(line["text"].split())
    assert done == {"rows": 3, "copies": 4, "replaced": 4, "before": 0.6667, "after": 0.8571}


def test_by_the_command_line(tmp_path, capsys):
    source = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    arguments = [str(source), str(tmp_path / "o.jsonl"), "--copies", "1", "--words", "--negatives", "--rate", "0"]
    app(["augment", *arguments], standalone_mode=False)
    assert "3 rows and 3 copies with 0 new values" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "no JSON object"),
        ("[]", "no JSON object"),
        (json.dumps({"text": "a"}), "spans"),
        (json.dumps({"text": "abc", "spans": [{"slot": "s", "start": 1}]}), "no 'end'"),
        (json.dumps({"text": "abc", "spans": [{"slot": "s", "start": 1, "end": 9}]}), "range|outside|end"),
    ],
)
def test_a_bad_line_is_named_and_nothing_is_written(tmp_path, line, says):
    source = tmp_path / "rows.jsonl"
    source.write_text(json.dumps(ROWS[0]) + "\n" + line + "\n")
    with pytest.raises(DataError, match=says) as error:
        augment_file(source, tmp_path / "more.jsonl", SpanReplace())
    assert "rows.jsonl:2" in str(error.value)
    assert not (tmp_path / "more.jsonl").exists()


def test_nothing_is_overwritten(tmp_path):
    source = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(DataError, match="exists"):
        augment_file(source, source, SpanReplace())
    with pytest.raises(DataError, match="cannot be read"):
        augment_file(tmp_path / "none.jsonl", tmp_path / "o.jsonl", SpanReplace())
