"""Every way in, every refusal with its place, and constant memory."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers import qa, write_jsonl
from residency import rows
from residency.errors import DataError

GOOD = {"instruction": "Why?", "output": "Because."}


def refusals(path, **kwargs):
    return [r for r in rows.stream(path, **kwargs) if isinstance(r, rows.Refused)]


def test_the_three_text_forms_and_classification(tmp_path):
    file = write_jsonl(
        tmp_path / "a.jsonl",
        [
            {
                "messages": [
                    {"role": "system", "content": "s"},
                    {"role": "user", "content": "q"},
                    {"role": "assistant", "content": "a"},
                ]
            },
            {"prompt": "Once", "completion": " upon"},
            {"instruction": "Add", "input": "1 2", "output": "3"},
            {"question": "Who?", "answer": "Me."},
            {"text": "nice", "label": "good"},
            {"image": "data:image/png;base64,AAAA", "label": 3},
        ],
    )
    found = rows.read(file).rows
    assert [r.prompt for r in found] == ["q", "Once", "Add\n\n1 2", "Who?", "nice", "(image)"]
    assert [r.answer for r in found] == ["a", " upon", "3", "Me.", "good", "3"]
    assert [r.chat for r in found][:2] == [True, False]


def test_rows_survive_writing_and_reading(tmp_path):
    file = write_jsonl(
        tmp_path / "a.jsonl",
        [
            qa(1),
            {"prompt": "p", "completion": "c"},
            {"text": "t", "label": "l"},
            {
                "messages": [{"role": "user", "content": "ü"}, {"role": "assistant", "content": "ß"}],
                "choices": ["x"],
                "category": "k",
            },
        ],
    )
    first = rows.read(file).rows
    rows.write(tmp_path / "b.jsonl", first)
    assert rows.read(tmp_path / "b.jsonl").rows == first


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"instruction": "a", "output": ', "broken JSON"),
        ("[1, 2]", "not list"),
        ("null", "not NoneType"),
        ('{"instruction": "a"}', "`output` is missing"),
        ('{"instruction": "a", "output": "  "}', "`output` is empty"),
        ('{"instruction": "a", "output": 3}', "is int, not text"),
        ('{"prompt": "a"}', "`completion` is missing"),
        ('{"foo": 1}', "no question and answer"),
        ('{"text": "a"}', "`label` is missing"),
        ('{"messages": []}', "not a list of turns"),
        ('{"messages": [{"role": "user", "content": "q"}]}', "not the assistant's"),
        ('{"messages": [{"role": "assistant", "content": "q"}]}', "no user turn"),
        ('{"messages": [{"role": "robot", "content": "q"}]}', "unknown role"),
        ('{"instruction": "a", "output": "\\ud800"}', "lone surrogates"),
        ('{"instruction": "a", "output": "' + "x" * 300 + '"}', "too long"),
        ("[" * 100_000, "broken JSON"),
    ],
)
def test_each_fault_is_refused_with_its_line(tmp_path, line, reason):
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps(GOOD) + "\n" + line + "\n" + json.dumps(qa(1)) + "\n")
    found = list(rows.stream(file, max_chars=200))
    assert [type(r).__name__ for r in found] == ["Row", "Refused", "Row"]
    assert found[1].line == 2
    assert reason in found[1].reason


def test_wrong_encoding_is_refused_with_the_byte(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(json.dumps(GOOD).encode() + b'\n{"instruction": "caf\xe9", "output": "x"}\n')
    (bad,) = refusals(file)
    assert (bad.line, "0xe9" in bad.reason) == (2, True)


def test_the_same_row_twice_and_the_same_id_twice(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", [GOOD, qa(1), GOOD, {**qa(2), "id": "permit-1"}])
    reading = rows.read(file)
    assert [r.reason for r in reading.refused] == ["the same row as line 1", "the id 'permit-1' was used before"]
    assert reading.duplicates == 1


def test_byte_order_mark_blank_lines_and_no_newline_at_the_end(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\n\n" + json.dumps(qa(1)).encode())
    assert [r.line for r in rows.read(file).rows] == [1, 3]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"a": 1}\n'.encode("utf-16"), "UTF-16"),
        ("a.jsonl", b"\x1f\x8b\x08\x00rest", "gzip"),
        ("a.jsonl", b"[\n{}\n]", "one JSON document"),
        ("a.jsonl", b"", "no rows"),
        ("a.jsonl", b"{}\n{}\n", "none of its 2 rows"),
        ("a.parquet", b"not parquet at all", "Parquet"),
        ("a.xlsx", b"PK", "unknown kind"),
        ("a.csv", b"q,q\n1,2\n", "same name"),
    ],
)
def test_unusable_sources_say_what_and_where(tmp_path, name, content, message):
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        rows.read(file)
    assert "a." in str(error.value)


def test_csv_with_quotes_newlines_and_bad_rows(tmp_path):
    file = tmp_path / "a.csv"
    file.write_bytes(b'instruction,output\n"What, now?","line 1\nline 2"\nonly one cell\ncaf\xe9,x\nq,a\n')
    found = list(rows.stream(file))
    good = [r for r in found if isinstance(r, rows.Row)]
    assert [r.answer for r in good] == ["line 1\nline 2", "a"]
    bad = {r.line: r.reason for r in found if isinstance(r, rows.Refused)}
    assert "header has 2" in bad[4]
    assert "not UTF-8" in bad[5]


def test_parquet_and_datasets_objects(tmp_path):
    import datasets

    ds = datasets.Dataset.from_list([qa(i) for i in range(5)])
    ds.to_parquet(str(tmp_path / "a.parquet"))
    ds.save_to_disk(str(tmp_path / "folder"))
    expected = [r.answer for r in rows.read(ds, name="ds").rows]
    assert len(expected) == 5
    assert [r.answer for r in rows.read(tmp_path / "a.parquet").rows] == expected
    assert [r.answer for r in rows.read(tmp_path / "folder").rows] == expected


def test_a_truncated_parquet_file_is_one_clear_error(tmp_path):
    import datasets

    datasets.Dataset.from_list([qa(i) for i in range(500)]).to_parquet(str(tmp_path / "a.parquet"))
    content = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match="damaged"):
        rows.read(tmp_path / "a.parquet")


def test_a_line_of_many_megabytes_is_refused_without_being_held(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "MAX_LINE", 4096)
    file = tmp_path / "a.jsonl"
    file.write_bytes(
        json.dumps({"instruction": "a", "output": "x" * 20_000}).encode() + b"\n" + json.dumps(GOOD).encode()
    )
    found = list(rows.stream(file))
    assert "longer than" in found[0].reason
    assert (found[1].line, found[1].answer) == (2, "Because.")


JSONISH = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "messages",
                    "role",
                    "content",
                    "prompt",
                    "completion",
                    "instruction",
                    "output",
                    "text",
                    "label",
                    "image",
                    "id",
                    "choices",
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.one_of(JSONISH.map(lambda v: json.dumps(v).encode()), st.binary(max_size=60)), max_size=6))
def test_no_malformed_file_gives_a_traceback(tmp_path, lines):
    """200 malformed files: rows or refusals with their line, or one DataError that names the place; nothing else."""
    file = tmp_path / "fuzz.jsonl"
    file.write_bytes(b"\n".join(lines))
    try:
        for item in rows.stream(file):
            assert item.line >= 1
            if isinstance(item, rows.Refused):
                assert item.reason
                json.dumps(item.to_json()).encode()
    except DataError as error:
        assert "fuzz.jsonl" in str(error)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=400))
def test_no_malformed_csv_gives_a_traceback(tmp_path, content):
    file = tmp_path / "fuzz.csv"
    file.write_bytes(b"instruction,output\n" + content)
    try:
        assert all(item.line >= 1 for item in rows.stream(file))
    except DataError as error:
        assert "fuzz.csv" in str(error)


def test_memory_stays_flat_while_a_large_file_is_read(tmp_path):
    """200 MB of JSONL stream through a process whose memory grows by less than 60 MB."""
    file = tmp_path / "big.jsonl"
    with file.open("w") as handle:
        for i in range(20_000):
            handle.write(json.dumps({"instruction": f"question {i}", "output": f"{i} " + "word " * 2_000}) + "\n")
    assert file.stat().st_size > 190 << 20
    code = (
        "import resource, sys\n"
        "from residency import rows\n"
        "next(iter(rows.stream(sys.argv[1])))\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "n = sum(1 for _ in rows.stream(sys.argv[1]))\n"
        "print(n, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    out = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=True).stdout
    n, grown_kib = map(int, out.split())
    assert n == 20_000
    assert grown_kib < 60 * 1024


def test_lines_and_ids_stay_right_after_lines_the_csv_reader_never_saw(tmp_path):
    file = tmp_path / "a.csv"
    file.write_bytes(b"instruction,output\nq1,a1\ncaf\xe9,x\nq2,a2\nq3,a3\ncaf\xe9,y\nq4,a4\n")
    found = list(rows.stream(file))
    assert [(type(r).__name__, r.line) for r in found] == [
        ("Row", 2),
        ("Refused", 3),
        ("Row", 4),
        ("Row", 5),
        ("Refused", 6),
        ("Row", 7),
    ]


@pytest.mark.parametrize(
    "raw", [{**GOOD, "id": "\ud800"}, {**GOOD, "category": "\ud83d"}, {**GOOD, "choices": ["\udfff"]}, {"\ud800": 1}]
)
def test_lone_surrogates_anywhere_are_refused_and_printable(raw):
    (bad,) = list(rows.stream([raw], name="x"))
    assert isinstance(bad, rows.Refused)
    json.dumps(bad.to_json(), ensure_ascii=False).encode("utf-8")


def test_what_a_run_wrote_is_read_back_whole(tmp_path):
    long = rows.Row("1", (("user", "q"), ("assistant", "x" * 50_000)))
    rows.write(tmp_path / "a.jsonl", [long, long])
    assert rows.load(tmp_path / "a.jsonl") == [long, long]
    (tmp_path / "a.jsonl").write_text('{"id": "1"}\n')
    with pytest.raises(DataError, match=r"damaged.*|a.jsonl:1"):
        rows.load(tmp_path / "a.jsonl")


def test_images_are_looked_for_beside_the_file_and_nowhere_else(tmp_path):
    (tmp_path / "pool").mkdir()
    (tmp_path / "secret.png").write_bytes(b"x")
    (tmp_path / "pool" / "in.png").write_bytes(b"x")
    file = write_jsonl(
        tmp_path / "pool" / "a.jsonl",
        [{"image": i, "label": "l"} for i in ("in.png", "../secret.png", str(tmp_path / "secret.png"), "none.png")],
    )
    found = list(rows.stream(file))
    assert found[0].image == str(tmp_path / "pool" / "in.png")
    assert [
        "leaves the folder" in found[1].reason,
        "leaves the folder" in found[2].reason,
        "no image" in found[3].reason,
    ] == [True] * 3
