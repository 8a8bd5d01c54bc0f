"""Span replacement from file to file: JSONL rows with spans in, the same rows and their copies out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from residency.curate.spans import Row, SpanReplace, checked
from residency.errors import DataError
from residency.store import write_text


def augment_file(source: Path, target: Path, method: SpanReplace) -> dict[str, Any]:
    """Write the rows of a file and their copies; a copy names the line it is of and what was replaced.

    Args:
        source: JSONL: each line {tokens or text, spans: [{slot, start, end, value?}]}.
        target: A file that does not exist yet; whole or not there.
        method: How to replace.

    Returns:
        `rows`, `copies`, `replaced` values, and the share of rows with a span `before` and `after`.

    Raises:
        DataError: With file and line, when a line is no such row, or when the target exists.
    """
    if target.exists():
        raise DataError("the file exists", where=str(target), hint="name another, or remove it")
    rows = _rows(source)
    try:
        found = method.augment(rows)
    except ValueError as error:
        raise DataError(str(error), where=str(source)) from None
    lines = []
    for i, (row, origin, replaced) in enumerate(zip(found.rows, found.origin, found.replaced, strict=True)):
        more = {"copy_of": origin + 1, "replaced": replaced} if i >= len(rows) else {}
        lines.append(json.dumps({**row, **more}, ensure_ascii=False) + "\n")
    write_text(target, "".join(lines))
    return {
        "rows": len(rows),
        "copies": len(found.rows) - len(rows),
        "replaced": sum(map(len, found.replaced)),
        **{name: round(share, 4) for name, share in found.balance.items()},
    }


def _rows(source: Path) -> list[Row]:
    try:
        text = source.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"the file cannot be read: {error.strerror}", where=str(source)) from None
    except UnicodeDecodeError:
        raise DataError("the file is not UTF-8 text", where=str(source), hint="save it as UTF-8") from None
    rows: list[Row] = []
    for number, line in enumerate(text.split("\n"), 1):
        where = f"{source}:{number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise json.JSONDecodeError("no object", line, 0)
            checked(row, "the row")
        except (json.JSONDecodeError, RecursionError):
            raise DataError("the line is no JSON object", where=where, hint='{"text": …, "spans": […]}') from None
        except (TypeError, AttributeError) as error:
            raise DataError(f"a part of the row is of another type than it must be: {error}", where=where) from None
        except KeyError as error:
            raise DataError(f"a span has no {error}", where=where, hint="{slot, start, end}") from None
        except ValueError as error:
            raise DataError(str(error), where=where) from None
        rows.append(row)
    if not rows:
        raise DataError("the file has no rows", where=str(source))
    return rows
