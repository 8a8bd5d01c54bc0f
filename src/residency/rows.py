"""Data in: JSONL, CSV, Parquet or a `datasets` object → rows of one shape; every bad row to quarantine with its reason.

Reading is a stream: one line (or one Parquet batch) is in memory at a time, so a 2 GB file needs megabytes.
Recognised fields, first match wins:

    messages                          chat turns, the last one the assistant's answer
    prompt + completion               plain continuation (no chat template)
    instruction [+ input] + output    Alpaca; question + answer likewise
    dialogue + label                  turns of {speaker, text}; the label is the last turn's
    image + label(s) [+ text]         classification (image: a path beside the file, or a data: URI; text: its caption)
    text + label(s)                   `labels` is a list: several may be true, or none

A folder of folders of images is read as image + label, the label being the inner folder's name, and the caption
`name.txt` beside `name.png` if there is one. `datasets` image columns and class labels are taken as they are.

A row is refused, never repaired: broken JSON, missing field, empty answer, wrong encoding, too long, the same row
twice. The refusal says file, line and reason, and is written to quarantine.jsonl.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from residency.errors import DataError

MAX_LINE = 16 << 20
"""Bytes of one line; a longer one is refused without being held."""

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Row:
    """One good row.

    Args:
        id: The row's own id, or `file:line`.
        messages: Chat turns; empty for classification rows. The last is the assistant's answer.
        chat: False for prompt/completion rows, which are rendered without a chat template.
        text, image, label: Of classification rows; the text of a row with an image is its caption.
        labels: Instead of `label`, where several may be true; None where the row has one label.
        dialogue: (speaker, text) of every turn, where the label is that of the last one.
        choices: Wrong answers to choose among, if the source gives any.
        tag: Free text the source attaches (`category`, `type`), shown in figures.
        source, line: Where it was read.
    """

    id: str
    messages: tuple[tuple[str, str], ...] = ()
    chat: bool = True
    text: str | None = None
    image: str | None = None
    label: str | None = None
    labels: tuple[str, ...] | None = None
    dialogue: tuple[tuple[str, str], ...] = ()
    choices: tuple[str, ...] = ()
    tag: str | None = None
    source: str = ""
    line: int = 0

    @property
    def prompt(self) -> str:
        """The question as a reader sees it: the last user turn, or the text to classify."""
        if self.dialogue:
            return f"{self.dialogue[-1][0]}: {self.dialogue[-1][1]}"
        if not self.messages:
            return self.text if self.text is not None else "(image)"
        return next((content for role, content in reversed(self.messages[:-1]) if role == "user"), "")

    @property
    def answer(self) -> str:
        """The answer, or the label; several labels sorted, with " | " between them."""
        if self.labels is not None:
            return " | ".join(sorted(self.labels))
        return self.messages[-1][1] if self.messages else (self.label or "")

    @property
    def content(self) -> str:
        """Question and answer as one text, for embeddings."""
        return f"{self.prompt}\n{self.answer}"

    def key(self) -> bytes:
        """A digest of the content, to find the same row twice."""
        parts = [self.messages, self.text, self.image, self.label, self.labels, self.dialogue]
        return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).digest()

    def to_json(self) -> dict[str, Any]:
        """The row in the form this module reads back."""
        out: dict[str, Any] = {"id": self.id}
        if self.messages and self.chat:
            out["messages"] = [{"role": r, "content": c} for r, c in self.messages]
        elif self.messages:
            out |= {"prompt": self.messages[0][1], "completion": self.messages[-1][1]}
        for name in ("text", "image", "label", "tag"):
            if getattr(self, name) is not None:
                out[name] = getattr(self, name)
        if self.labels is not None:
            out["labels"] = list(self.labels)
        if self.dialogue:
            out["dialogue"] = [{"speaker": speaker, "text": text} for speaker, text in self.dialogue]
        if self.choices:
            out["choices"] = list(self.choices)
        return out | {"source": self.source, "line": self.line}


@dataclass(frozen=True)
class Refused:
    """One row that was not taken: where it stands, why, and how it starts."""

    source: str
    line: int
    reason: str
    text: str = ""

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready copy."""
        return {"source": self.source, "line": self.line, "reason": self.reason, "text": self.text}


@dataclass
class Reading:
    """What became of a source that was read to its end."""

    rows: list[Row] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)

    @property
    def duplicates(self) -> int:
        """How many rows were refused because the same row came before."""
        return sum(r.reason.startswith("the same row as") for r in self.refused)


class _BadRowError(ValueError):
    """The reason why one row is refused."""


# ------------------------------------------------------------------ reading


def stream(
    source: Any, *, max_chars: int = 32_768, name: str | None = None, labelled: bool = True
) -> Iterator[Row | Refused]:
    """Read a source row by row.

    Args:
        source: A path (.jsonl, .json lines, .csv, .tsv, .parquet, a `datasets` folder saved with `save_to_disk`), a
            `datasets.Dataset`, or any iterable of dicts.
        max_chars: Rows with more characters are refused.
        name: What refusals call the source; the file's name by default.
        labelled: Whether a text, image or dialogue without a label is refused.

    Yields:
        `Row` or `Refused`, in the order of the source.

    Raises:
        DataError: When the source itself cannot be read.
    """
    folder = Path(source).resolve().parent if isinstance(source, str | Path) else None
    label = name or (Path(source).name if isinstance(source, str | Path) else "rows")
    seen: dict[bytes, int] = {}
    ids: set[str] = set()
    for line, raw in _records(source, label):
        try:
            row = _row(raw, label, line, max_chars, folder, labelled)
            first = seen.setdefault(row.key(), line)
            if first != line:
                raise _BadRowError(f"the same row as line {first}")
            if row.id in ids:
                raise _BadRowError(f"the id {row.id!r} was used before")
            ids.add(row.id)
            yield row
        except _BadRowError as reason:
            yield Refused(label, line, _printable(str(reason)), _excerpt(raw))


def read(source: Any, *, max_chars: int = 32_768, name: str | None = None, limit: int | None = None) -> Reading:
    """Read a whole source (or its first `limit` good rows) into memory.

    Raises:
        DataError: When the source cannot be read, or has no usable row at all.
    """
    reading = Reading()
    for item in stream(source, max_chars=max_chars, name=name):
        if isinstance(item, Refused):
            reading.refused.append(item)
        else:
            reading.rows.append(item)
            if limit is not None and len(reading.rows) >= limit:
                break
    if not reading.rows:
        raise no_rows(name or str(source), reading.refused)
    return reading


def load(path: Path) -> list[Row]:
    """Read back a file that `write` made: no limit, nothing refused, the same rows in the same order.

    Raises:
        DataError: When a line is not what `write` writes.
    """
    found = []
    for line, raw in _jsonl(path):
        try:
            found.append(_row(raw, path.name, line, None, None))
        except _BadRowError as reason:
            raise DataError(f"this file of the run is damaged: {reason}", where=f"{path}:{line}") from None
    return found


def no_rows(where: str, refused: list[Refused]) -> DataError:
    """The error for a source without a usable row: how many were refused and why, most common first."""
    if not refused:
        return DataError("the source has no rows", where=where, hint="it needs at least one row")
    reasons = Counter(r.reason for r in refused).most_common(3)
    said = "; ".join(f"{count}× {reason}" for reason, count in reasons)
    return DataError(
        f"none of its {len(refused):,} rows can be used: {said}",
        where=f"{where}:{refused[0].line}",
        hint="rows need messages, prompt+completion, instruction+output, text+label or image+label",
    )


def write(path: Path, rows: Iterable[Row]) -> int:
    """Write rows as JSONL that `stream` reads back; returns how many."""
    count = 0
    with path.open("w", encoding="utf-8") as handle:
        for row in rows:
            handle.write(json.dumps(row.to_json(), ensure_ascii=False) + "\n")
            count += 1
    return count


def _records(source: Any, label: str) -> Iterator[tuple[int, Any]]:
    """(line, dict or _BadRowError) for every record of a source."""
    if not isinstance(source, str | Path):
        yield from enumerate(_named(source), 1)
        return
    path = Path(source)
    if not path.exists():
        raise DataError("there is no such file", where=str(path), hint="paths in a recipe are relative to the recipe")
    if path.is_dir():
        pictures = None if (path / "state.json").exists() or (path / "dataset_dict.json").exists() else _pictures(path)
        yield from _records(_load_from_disk(path), label) if pictures is None else enumerate(pictures, 1)
        return
    readers = {".jsonl": _jsonl, ".json": _jsonl, ".ndjson": _jsonl, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"unknown kind of file `{path.suffix}`", where=str(path), hint=f"one of {', '.join(readers)}")
    try:
        yield from reader(path)
    except OSError as error:
        raise DataError(f"the file cannot be read: {error.strerror or error}", where=str(path)) from None


MAGIC = {b"\x89PNG": "png", b"\xff\xd8": "jpeg", b"GIF8": "gif", b"RIFF": "webp"}
"""First bytes of a picture → its kind."""

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
"""Endings of files that count as images in a folder of folders."""


def _pictures(path: Path) -> list[dict[str, Any]] | None:
    """Records of a folder of folders of images; None where it is none."""
    files = sorted(f for f in path.glob("*/*") if f.suffix.lower() in IMAGES)
    found = []
    for file in files:
        beside = file.with_suffix(".txt")
        caption = {"text": beside.read_text(encoding="utf-8", errors="replace")} if beside.is_file() else {}
        where = file.relative_to(path.parent)
        name = str(file.relative_to(path))
        found.append({"id": name, "image": str(where), "label": file.parent.name, **caption})
    return found or None


def _named(source: Iterable[Any]) -> Iterator[Any]:
    """Records of a `datasets.Dataset` with class labels as names; anything else as it is."""
    features = getattr(source, "features", None) or {}
    names = {key: f.names for key, f in features.items() if hasattr(f, "names") and hasattr(f, "int2str")}
    for record in source:
        if names and isinstance(record, dict):
            known = {k: names[k][record[k]] for k in names if isinstance(record.get(k), int) and record[k] >= 0}
            record = {**record, **known}
        yield record


def _load_from_disk(path: Path) -> Any:
    import datasets

    try:
        return datasets.load_from_disk(str(path))
    except Exception as error:
        raise DataError(f"the folder is no `datasets` folder: {error}", where=str(path)) from None


def _lines(path: Path) -> Iterator[tuple[int, str | _BadRowError]]:
    """Decoded lines with their numbers; a line that is not UTF-8 or too long comes as its reason."""
    with path.open("rb") as handle:
        head = handle.read(4)
        if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise DataError("the file is UTF-16", where=str(path), hint="convert it: iconv -f UTF-16 -t UTF-8")
        if head[:2] == b"\x1f\x8b":
            raise DataError("the file is gzip-compressed", where=str(path), hint="unpack it first: gunzip")
        handle.seek(3 if head[:3] == b"\xef\xbb\xbf" else 0)
        number = 0
        while raw := handle.readline(MAX_LINE):
            number += 1
            if len(raw) == MAX_LINE and not raw.endswith(b"\n"):
                while (rest := handle.readline(MAX_LINE)) and not rest.endswith(b"\n"):
                    pass
                yield number, _BadRowError(f"the line is longer than {MAX_LINE >> 20} MiB")
                continue
            try:
                yield number, raw.decode("utf-8")
            except UnicodeDecodeError as error:
                yield number, _BadRowError(f"not UTF-8: byte 0x{raw[error.start]:02x} at column {error.start + 1}")


def _jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in _lines(path):
        if isinstance(line, _BadRowError):
            yield number, line
        elif line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                if number == 1 and line.strip() in ("[", "{"):
                    raise DataError(
                        "the file is one JSON document, not JSON lines",
                        where=f"{path}:1",
                        hint="write one object per line: jq -c '.[]' file.json > file.jsonl",
                    ) from None
                yield number, _BadRowError(f"broken JSON: {error.msg} at column {error.colno}")
            except (RecursionError, ValueError) as error:
                yield number, _BadRowError(f"broken JSON: {str(error)[:80]}")


def _csv(path: Path) -> Iterator[tuple[int, Any]]:
    bad: list[tuple[int, _BadRowError]] = []

    def good() -> Iterator[str]:
        for number, line in _lines(path):
            if isinstance(line, _BadRowError):
                bad.append((number, line))
            else:
                yield line.replace("\0", "")

    csv.field_size_limit(MAX_LINE)
    reader = csv.reader(good(), delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
    header: list[str] | None = None
    skipped = 0  # lines the CSV reader never saw
    while True:
        problem: csv.Error | None = None
        cells: list[str] = []
        try:
            cells = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            problem = error
        skipped += len(bad)
        yield from bad
        bad.clear()
        number = reader.line_num + skipped
        if problem is not None:
            yield number, _BadRowError(f"broken CSV: {problem}")
            continue
        if header is None:
            header = [c.strip() for c in cells]
            if len(set(header)) != len(header):
                raise DataError("two columns have the same name", where=f"{path}:1", hint=f"columns: {header}")
        elif len(cells) != len(header):
            if cells:
                yield number, _BadRowError(f"{len(cells)} cells, but the header has {len(header)} columns")
        else:
            yield number, dict(zip(header, cells, strict=True))
    yield from bad


def _parquet(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for record in batch.to_pylist():
                    number += 1
                    yield number, record
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, UnicodeDecodeError) as error:
        raise DataError(
            f"the Parquet file is damaged: {str(error).splitlines()[0][:120]}", where=f"{path}:{number + 1}"
        ) from None


# ------------------------------------------------------------------ one record → one row


def _row(raw: Any, label: str, line: int, max_chars: int | None, folder: Path | None, labelled: bool = True) -> Row:
    if isinstance(raw, _BadRowError):
        raise raw
    if not isinstance(raw, dict):
        raise _BadRowError(f"a row is an object with fields, not {type(raw).__name__}")
    given = raw.get("id")
    identity = str(given) if isinstance(given, str | int) and str(given) else f"{label}:{line}"
    tag = next((str(raw[k]) for k in ("tag", "category", "type") if isinstance(raw.get(k), str)), None)
    common: dict[str, Any] = {
        "id": identity,
        "tag": tag,
        "source": raw["source"] if isinstance(raw.get("source"), str) and isinstance(raw.get("line"), int) else label,
        "line": raw["line"] if isinstance(raw.get("source"), str) and isinstance(raw.get("line"), int) else line,
    }
    if raw.get("messages") is not None:
        row = Row(messages=_turns(raw["messages"]), choices=_choices(raw), **common)
    elif raw.get("prompt") is not None or raw.get("completion") is not None:
        turns = (("user", _text(raw, "prompt")), ("assistant", _text(raw, "completion")))
        row = Row(messages=turns, chat=False, choices=_choices(raw), **common)
    elif raw.get("instruction") is not None or raw.get("output") is not None:
        asked = _text(raw, "instruction")
        if isinstance(raw.get("input"), str) and raw["input"].strip():
            asked += "\n\n" + raw["input"]
        row = Row(messages=(("user", asked), ("assistant", _text(raw, "output"))), choices=_choices(raw), **common)
    elif raw.get("question") is not None or raw.get("answer") is not None:
        turns = (("user", _text(raw, "question")), ("assistant", _text(raw, "answer")))
        row = Row(messages=turns, choices=_choices(raw), **common)
    elif raw.get("label") is not None or raw.get("labels") is not None:
        row = Row(**_content(raw, folder), **_labels(raw), **common)
    elif any(raw.get(name) is not None for name in ("text", "image", "dialogue")):
        if labelled:
            raise _BadRowError("the field `label` is missing")
        row = Row(**_content(raw, folder), **common)
    else:
        found = ", ".join(f"`{str(k)[:30]}`" for k in list(raw)[:6]) or "nothing"
        raise _BadRowError(f"no question and answer here (fields: {found})")
    size = sum(len(c) for _, c in (*row.messages, *row.dialogue)) + len(row.text or "")
    for value in (row.id, row.tag or "", row.source, *row.choices):
        if _printable(value) != value:
            raise _BadRowError("the id, tag or choices have characters that are not Unicode (lone surrogates)")
    if max_chars is not None and size > max_chars:
        raise _BadRowError(f"too long: {size:,} characters, at most {max_chars:,}")
    return row


def _text(raw: dict, name: str) -> str:
    value = raw.get(name)
    if value is None:
        raise _BadRowError(f"the field `{name}` is missing")
    if not isinstance(value, str):
        raise _BadRowError(f"the field `{name}` is {type(value).__name__}, not text")
    if not value.strip():
        raise _BadRowError(f"the field `{name}` is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise _BadRowError(f"the field `{name}` has characters that are not Unicode (lone surrogates)") from None
    return value


def _image(value: str, folder: Path | None) -> str:
    """A data: URI as it is; a path made absolute. Rows of a file may only name images below the file's folder."""
    if value.startswith("data:") or folder is None:
        return value
    path = (folder / value).resolve()
    if not path.is_relative_to(folder):
        raise _BadRowError("the image's path leaves the folder of the file")
    if not path.is_file():
        raise _BadRowError(f"there is no image `{value[:80]}` beside the file")
    return str(path)


def _picture(value: Any, folder: Path | None) -> str:
    """An image as a row keeps it: a path or data: URI; decoded ones (of `datasets` columns) become a data: URI."""
    if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
        kind = next((name for start, name in MAGIC.items() if value["bytes"].startswith(start)), "png")
        return f"data:image/{kind};base64," + base64.b64encode(value["bytes"]).decode()
    if isinstance(value, dict) and isinstance(value.get("path"), str):
        value = value["path"]
    if hasattr(value, "getpixel"):
        from residency.images import data_uri

        return data_uri(value)
    return _image(_text({"image": value}, "image"), folder)


def _content(raw: dict, folder: Path | None) -> dict[str, Any]:
    """What is to be classified: a dialogue, an image perhaps with a caption, or a text."""
    if raw.get("dialogue") is not None:
        return {"dialogue": _dialogue(raw["dialogue"])}
    if raw.get("image") is None:
        return {"text": _text(raw, "text")}
    caption = next((raw[name] for name in ("text", "caption") if isinstance(raw.get(name), str)), "")
    return {
        "image": _picture(raw["image"], folder),
        "text": _text({"text": caption}, "text") if caption.strip() else None,
    }


def _dialogue(value: Any) -> tuple[tuple[str, str], ...]:
    if not isinstance(value, list) or not value:
        raise _BadRowError("the field `dialogue` is not a list of turns")
    turns = []
    for i, turn in enumerate(value):
        if not isinstance(turn, dict) or not isinstance(turn.get("speaker"), str):
            raise _BadRowError(f"turn {i + 1} of `dialogue` has no speaker")
        turns.append((_text(turn, "speaker"), _text(turn, "text")))
    return tuple(turns)


def _labels(raw: dict) -> dict[str, Any]:
    value = raw.get("labels")
    if value is None:
        return {"label": _label(raw)}
    if raw.get("label") is not None:
        raise _BadRowError("the row has both `label` and `labels`")
    if not isinstance(value, list) or not all(isinstance(v, str) and v.strip() for v in value):
        raise _BadRowError("the field `labels` is not a list of texts")
    if len(set(value)) < len(value):
        raise _BadRowError("a label stands twice in `labels`")
    for label in value:
        _text({"labels": label}, "labels")
        if " | " in label:
            raise _BadRowError("a label holds ` | `, which separates labels")
    return {"labels": tuple(value)}


def _printable(text: str) -> str:
    """A text that can be written as UTF-8."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _label(raw: dict) -> str:
    value = raw["label"]
    if isinstance(value, bool | int):
        return str(value)
    return _text(raw, "label")


def _choices(raw: dict) -> tuple[str, ...]:
    value = raw.get("choices")
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(v, str) and v.strip() for v in value):
        raise _BadRowError("the field `choices` is not a list of texts")
    return tuple(value)


def _turns(value: Any) -> tuple[tuple[str, str], ...]:
    if not isinstance(value, list) or not value:
        raise _BadRowError("the field `messages` is not a list of turns")
    turns = []
    for i, turn in enumerate(value):
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
            raise _BadRowError(f"turn {i + 1} of `messages` has no role")
        if turn["role"] not in ROLES:
            raise _BadRowError(f"turn {i + 1} has the unknown role `{turn['role'][:30]}`")
        turns.append((turn["role"], _text(turn, "content")))
    if turns[-1][0] != "assistant":
        raise _BadRowError("the last turn of `messages` is not the assistant's")
    if not any(role == "user" for role, _ in turns[:-1]):
        raise _BadRowError("`messages` has no user turn before the answer")
    return tuple(turns)


def _excerpt(raw: Any) -> str:
    if isinstance(raw, _BadRowError):
        return ""
    try:
        text = json.dumps(raw, ensure_ascii=False, default=str)
    except (TypeError, ValueError, RecursionError):
        text = repr(type(raw))
    return text[:200].encode("utf-8", "replace").decode("utf-8")
