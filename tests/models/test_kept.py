"""What a config.json meant, remembered from start to start."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jlorax.errors import ModelInvalid
from jlorax.models import kept
from jlorax.models.config import ModelConfig, parse_config, read_config
from jlorax.models.kept import kept_config
from tests import tiny_llama


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_llama.write_model(tmp_path / "tiny")


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that were really read."""
    folders: list[Path] = []

    def reading(folder: Path) -> ModelConfig:
        folders.append(folder)
        return read_config(folder)

    monkeypatch.setattr(kept, "read_config", reading)
    return folders


def test_a_config_is_read_once(folder: Path, tmp_path: Path, read: list[Path]) -> None:
    answers = [kept_config(folder, tmp_path / "store") for _ in range(3)]
    assert answers == [read_config(folder)] * 3
    assert len({repr(answer) for answer in answers}) == 1  # executables are found by it
    assert len(read) == 1


def test_another_content_is_another_config(folder: Path, tmp_path: Path) -> None:
    kept_config(folder, tmp_path / "store")
    file = folder / "config.json"
    raw = json.loads(file.read_text()) | {"num_hidden_layers": 7}
    file.write_text(json.dumps(raw))
    assert kept_config(folder, tmp_path / "store") == parse_config(raw, "changed")


@pytest.mark.parametrize("depends_on", ["transformers", "our reader"])
def test_another_reader_reads_again(
    folder: Path,
    tmp_path: Path,
    read: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    depends_on: str,
) -> None:
    kept_config(folder, tmp_path / "store")
    if depends_on == "transformers":
        monkeypatch.setattr(kept, "version", lambda name: "0")
    else:
        monkeypatch.setattr(kept.config, "__file__", __file__)
    kept_config(folder, tmp_path / "store")
    assert len(read) == 2


@pytest.mark.parametrize("content", [b"", b"torn", b"\x80\x04N."], ids=["empty", "torn", "None"])
def test_a_bad_file_is_made_again(
    folder: Path, tmp_path: Path, read: list[Path], content: bytes
) -> None:
    store = tmp_path / "store"
    kept_config(folder, store)
    (file,) = store.glob("*.config")
    file.write_bytes(content)
    assert [kept_config(folder, store) for _ in range(2)] == [read_config(folder)] * 2
    assert len(read) == 2


def test_a_store_that_cannot_be_written_stops_nothing(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert kept_config(folder, tmp_path / "file" / "store") == read_config(folder)
    assert kept_config(folder, None) == read_config(folder)


def test_what_is_wrong_is_said_every_time(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(ModelInvalid, match="no such file"):
            kept_config(tmp_path, tmp_path / "store")
    (tmp_path / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": "x"}')
    for _ in range(2):
        with pytest.raises(ModelInvalid):
            kept_config(tmp_path, tmp_path / "store")
