"""Rows of data as dicts of columns, from a file or from memory; read as a stream. Plain."""

from __future__ import annotations

import csv
import hashlib
import importlib
import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jlorax.errors import ConfigError, DataInvalid

MAX_ROW_BYTES = 8 << 20
MAX_FILE_BYTES = 16 << 30
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")

Row = Mapping[str, Any]


class Digest:
    """SHA-256 over rows in their order: of what was read, whatever file it stood in."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def seen(self, rows: Iterable[tuple[int, Row]]) -> Iterator[tuple[int, Row]]:
        for number, row in rows:
            self._hash.update(json.dumps(row, sort_keys=True, default=str).encode())
            yield number, row

    def hex(self) -> str:
        return self._hash.hexdigest()


def read_rows(path: str, root: str | None = None) -> Iterator[tuple[int, Row]]:
    """(row's number from 1, row). JSON lines, a JSON list, CSV, TSV or Parquet, by the name.

    DataInvalid says what is wrong and in which line; ConfigError that the path may not be read.
    ``root``: the path is below it, links included.
    """
    file = checked_path(path, root)
    match file.suffix.lower():
        case ".jsonl":
            yield from _json_lines(file)
        case ".json":
            yield from _json_list(file)
        case ".csv":
            yield from _separated(file, ",")
        case ".tsv":
            yield from _separated(file, "\t")
        case ".parquet":
            yield from _parquet(file)


def checked_path(path: str, root: str | None = None) -> Path:
    """A regular file of a kind that is read, of a size that may be read, where it may lie."""
    if "://" in path:
        raise ConfigError(f"dataset {path!r} is a URL; a file on this machine is needed")
    file = Path(path).expanduser()
    if root is not None:
        file = _below(file, Path(root), path)
    try:
        status = file.stat()
    except OSError as error:
        raise ConfigError(f"dataset {path!r} cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(status.st_mode):
        raise ConfigError(f"dataset {path!r} is not a regular file")
    if status.st_size > MAX_FILE_BYTES:
        raise ConfigError(
            f"dataset {path!r} has {status.st_size} bytes, more than {MAX_FILE_BYTES}"
        )
    if file.suffix.lower() not in SUFFIXES:
        raise ConfigError(
            f"dataset {path!r} is of no known kind; names end in {', '.join(SUFFIXES)}"
        )
    return file


def _below(file: Path, root: Path, path: str) -> Path:
    base = root.resolve()
    found = (base / file).resolve()
    if not found.is_relative_to(base):
        raise ConfigError(f"dataset {path!r} leads out of the folder that data may lie in")
    return found


def write_json_lines(rows: Any, path: Path) -> None:
    """What a caller holds in memory, as a file: a list of dicts, or a DataFrame."""
    if hasattr(rows, "to_dict"):
        rows = rows.to_dict("records")
    if not isinstance(rows, Iterable) or isinstance(rows, str | bytes | Mapping):
        raise ConfigError(
            f"a dataset is a path, a list of dicts or a DataFrame, not {type(rows).__name__}"
        )
    with path.open("w", encoding="utf-8") as file:
        for number, row in enumerate(rows, 1):
            if not isinstance(row, Mapping):
                raise DataInvalid(number, f"is {type(row).__name__}, not a dict of columns")
            file.write(json.dumps(dict(row), default=str) + "\n")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Decoded lines without their ends; empty ones too."""
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_ROW_BYTES + 1), b""), 1):
            if len(line) > MAX_ROW_BYTES:
                raise DataInvalid(number, f"has more than {MAX_ROW_BYTES} bytes")
            yield number, _decoded(line, number).rstrip("\r\n")


def _decoded(line: bytes, number: int) -> str:
    if b"\0" in line:
        raise DataInvalid(number, "holds zero bytes: this is no text file")
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataInvalid(
            number, f"is not UTF-8: byte {error.object[error.start]:#x} at {error.start}"
        ) from None


def _json_lines(path: Path) -> Iterator[tuple[int, Row]]:
    for number, line in _lines(path):
        if line.strip():
            yield number, _json_row(line, number)


def _json_row(line: str, number: int) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataInvalid(number, f"is no JSON: {error}") from None
    if not isinstance(row, dict):
        raise DataInvalid(number, f"is {type(row).__name__}, not an object of columns")
    return row


def _json_list(path: Path) -> Iterator[tuple[int, Row]]:
    """A whole file at once, so a small one; a file of JSON lines under this name is read too."""
    with path.open("rb") as file:
        first = file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
    if first != b"[":
        yield from _json_lines(path)
        return
    if (size := os.stat(path).st_size) > 1 << 30:
        raise ConfigError(f"{path.name} has {size} bytes: as one list too much, use JSON lines")
    try:
        rows = json.loads(_decoded(path.read_bytes(), 1))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path.name} is no JSON: {error}") from None
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise DataInvalid(number, f"is {type(row).__name__}, not an object of columns")
        yield number, row


def _separated(path: Path, separator: str) -> Iterator[tuple[int, Row]]:
    """The first line names the columns (RFC 4180)."""
    csv.field_size_limit(MAX_ROW_BYTES)
    text = (f"{line}\n" for _, line in _lines(path))
    reader = csv.DictReader(text, delimiter=separator, strict=True)
    try:
        _check_header(reader.fieldnames or ())
        for row in reader:
            if None in row or None in row.values():
                raise DataInvalid(
                    reader.line_num, f"has not the {len(reader.fieldnames or ())} columns of line 1"
                )
            yield reader.line_num, row
    except csv.Error as error:
        raise DataInvalid(reader.line_num, f"is no CSV: {error}") from None


def _check_header(names: Sequence[str]) -> None:
    for name in names:
        if not name.strip():
            raise DataInvalid(1, "names a column with nothing")
        if names.count(name) > 1:
            raise DataInvalid(1, f"names {names.count(name)} columns {name!r}")


def _parquet(path: Path) -> Iterator[tuple[int, Row]]:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
        arrow_error = importlib.import_module("pyarrow").ArrowException
    except ImportError:
        raise ConfigError("a Parquet file needs pyarrow: pip install 'jlorax[train]'") from None
    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches(1024):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except (OSError, arrow_error) as error:
        raise DataInvalid(number + 1, f"cannot be read: {error}") from None
