"""Files of data to examples: every kind of row, and every fault with its row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jlorax.errors import ConfigError, DataInvalid
from jlorax.tokenizer import Tokenizer
from jlorax.training import records
from jlorax.training.config import DataConfig
from jlorax.training.examples import Data, Example, load_data
from jlorax.training.records import read_rows, write_json_lines
from tests import tiny_llama

EOS = tiny_llama.EOS
TEMPLATE = (
    "{% for m in messages %}w3 {{ m.content }} </s> w4 {% endfor %}"
    "{% if add_generation_prompt %}w3 {% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama.write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder)


def load(rows: Any, tokenizer: Tokenizer, tmp_path: Path, **settings: Any) -> Data:
    path = tmp_path / "data.jsonl"
    write_json_lines(rows, path)
    config = DataConfig(str(path), **{"validation_fraction": 0.0, **settings})
    return load_data(config, tokenizer, seed=0)


def learnt(example: Example) -> list[int]:
    return [int(i) for i in example.ids[example.is_target]]


def test_of_a_completion_its_end_is_learnt_and_the_prompt_is_not(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    rows = [{"prompt": "w5 w6", "completion": "w7 w8"}]
    (example,) = load(rows, tokenizer, tmp_path).train
    assert example.ids.tolist() == [5, 6, 7, 8, EOS]
    assert learnt(example) == [7, 8, EOS]
    assert example.next_targets().tolist() == [-1, 7, 8, EOS, -1]
    (whole,) = load(rows, tokenizer, tmp_path, train_on_prompt=True).train
    assert learnt(whole) == [5, 6, 7, 8, EOS]


def test_of_a_chat_every_answer_to_its_end_token(tokenizer: Tokenizer, tmp_path: Path) -> None:
    said = [
        {"role": "user", "content": "w10"},
        {"role": "assistant", "content": "w11"},
        {"role": "user", "content": "w12"},
        {"role": "assistant", "content": "w13 w14"},
    ]
    chat = tokenizer.with_template(TEMPLATE)
    (example,) = load([{"messages": said}], chat, tmp_path).train
    assert example.ids.tolist() == [3, 10, 2, 4, 3, 11, 2, 4, 3, 12, 2, 4, 3, 13, 14, 2, 4]
    assert learnt(example) == [11, EOS, 13, 14, EOS]
    (turn,) = load([{"prompt": "w10", "completion": "w11"}], chat, tmp_path).train
    assert learnt(turn) == [11, EOS]  # a template makes a chat of it
    (plain,) = load(
        [{"prompt": "w10", "completion": "w11"}], chat, tmp_path, use_chat_template=False
    ).train
    assert plain.ids.tolist() == [10, 11, EOS]


def test_a_template_that_rewrites_answers_is_said(tokenizer: Tokenizer, tmp_path: Path) -> None:
    counting = tokenizer.with_template("w{{ 3 + messages | length }} {{ messages[0].content }}")
    said = [{"role": "user", "content": "w10"}, {"role": "assistant", "content": "w11"}]
    with pytest.raises(DataInvalid, match=r"row 1 .* \(message 2\)"):
        load([{"messages": said}], counting, tmp_path)


def test_texts_and_templates(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (text,) = load([{"text": "w5 w6"}], tokenizer, tmp_path).train
    assert learnt(text) == [5, 6, EOS]
    rows = [{"who": "w9", "completion": "w7"}]
    (made,) = load(rows, tokenizer, tmp_path, template="w5 {who} w6").train
    assert made.ids.tolist() == [5, 9, 6, 7, EOS] and learnt(made) == [7, EOS]


def test_what_is_cut_or_left_out_is_counted(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [
        {"prompt": "w5", "completion": "w6"},
        {"prompt": "w5", "completion": "  "},
        {"prompt": "w5 w6 w7", "completion": "w8 " * 10},
        {"prompt": "w5 " * 20, "completion": "w8"},
    ]
    report = load(rows, tokenizer, tmp_path, max_seq_len=8).report
    assert (report.num_rows, report.num_used, report.num_empty) == (4, 2, 1)
    assert (report.num_truncated, report.num_dropped, report.longest) == (1, 1, 8)
    assert report.num_tokens == 3 + 8 and report.num_target_tokens == 2 + 5
    assert load(rows, tokenizer, tmp_path, max_seq_len=8, on_long="drop").report.num_dropped == 2
    with pytest.raises(DataInvalid, match="row 3 of the data has 14 tokens; max_seq_len is 8"):
        load(rows, tokenizer, tmp_path, max_seq_len=8, on_long="error")


def test_the_validation_part_follows_from_the_seed(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [{"prompt": f"w{3 + i}", "completion": f"w{4 + i}"} for i in range(40)]
    first, second = (load(rows, tokenizer, tmp_path, validation_fraction=0.1) for _ in range(2))
    assert [e.number for e in first.validation] == [e.number for e in second.validation]
    assert len(first.validation) == 4 and len(first.train) == 36
    assert not {e.number for e in first.train} & {e.number for e in first.validation}


def test_equal_rows_have_equal_digests(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [{"prompt": "w5", "completion": "w6"}]
    first = load(rows, tokenizer, tmp_path).report.digest
    assert first == load(rows, tokenizer, tmp_path).report.digest
    assert first != load([{**rows[0], "prompt": "w7"}], tokenizer, tmp_path).report.digest


# ---- files


def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path) -> None:
    rows = [{"prompt": 'é, "x"', "completion": "two\nlines"}, {"prompt": "b", "completion": "c"}]
    write_json_lines(rows, tmp_path / "a.jsonl")
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.csv").write_text(
        '\ufeffprompt,completion\r\n"é, ""x""","two\nlines"\r\nb,c\r\n', encoding="utf-8"
    )
    arrow, parquet = (pytest.importorskip(name) for name in ("pyarrow", "pyarrow.parquet"))
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for kind in ("jsonl", "json", "csv", "parquet"):
        found = [dict(row) for _, row in read_rows(str(tmp_path / f"a.{kind}"))]
        assert found == rows, kind


class Frame:
    """As a DataFrame gives its rows."""

    def to_dict(self, orient: str) -> list[dict[str, str]]:
        assert orient == "records"
        return [{"text": "a"}]


def test_rows_in_memory(tmp_path: Path) -> None:
    write_json_lines(Frame(), tmp_path / "a.jsonl")
    assert [row for _, row in read_rows(str(tmp_path / "a.jsonl"))] == [{"text": "a"}]
    with pytest.raises(ConfigError, match="not int"):
        write_json_lines(3, tmp_path / "b.jsonl")
    with pytest.raises(DataInvalid, match="row 2 of the data is str"):
        write_json_lines([{"a": 1}, "b"], tmp_path / "c.jsonl")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text"', "row 2 of the data is no JSON"),
        ("a.jsonl", b'["x"]\n', "row 1 of the data is list"),
        ("a.jsonl", b'{"text": "\xff"}\n', "row 1 of the data is not UTF-8: byte 0xff at 10"),
        ("a.jsonl", b"\0\0\0\0", "row 1 of the data holds zero bytes"),
        ("a.csv", b"prompt,completion\na\n", "row 2 of the data has not the 2 columns"),
        ("a.jsonl", b'{"prompt": "a"}\n', "row 1 of the data has the columns 'prompt'; needed are"),
        ("a.jsonl", b'{"prompt":"a","completion":"b"}\n{"prompt":"a"}\n', "row 2 .* lacks"),
        ("a.jsonl", b'{"messages": "hello"}\n', "row 1 .* no list of role and content"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "row 1 .* lone surrogate"),
        ("a.parquet", b"PAR1 no", "row 1 of the data cannot be read"),
    ],
)
def test_a_bad_row_is_named(
    name: str, content: bytes, message: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataInvalid, match=message):
        load_data(DataConfig(str(tmp_path / name)), tokenizer, seed=0)


def test_a_line_without_end_is_not_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "MAX_ROW_BYTES", 1000)
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n' + b"x" * 5000)
    with pytest.raises(DataInvalid, match="row 2 of the data has more than 1000 bytes"):
        list(read_rows(str(tmp_path / "a.jsonl")))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("https://example.org/a.jsonl", "is a URL"),
        ("nothing.jsonl", "No such file"),
        (".", "not a regular file"),
        ("a.pickle", "no known kind"),
        ("../outside.jsonl", "leads out of the folder"),
        ("/etc/passwd", "leads out of the folder"),
        ("link.jsonl", "leads out of the folder"),
    ],
)
def test_paths_that_are_not_read(path: str, message: str, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "a.pickle").write_bytes(b"x")
    (tmp_path / "outside.jsonl").write_text('{"text": "x"}\n')
    (root / "link.jsonl").symlink_to(tmp_path / "outside.jsonl")
    with pytest.raises(ConfigError, match=message):
        list(read_rows(path, str(root)))


def test_data_without_examples_say_why(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no examples: 2 rows, 2 of them empty"):
        load([{"text": ""}, {"text": " "}], tokenizer, tmp_path)


def test_next_targets_of_the_first_token() -> None:
    example = Example(np.array([5, 6], np.int32), np.array([True, True]), 1)
    assert example.num_targets == 1 and example.next_targets().tolist() == [6, -1]
