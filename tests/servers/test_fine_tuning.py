"""Adapters are made through the server: files, jobs, events; and the clients' way to them."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest

import jlorax
from jlorax import client_fine_tuning
from jlorax.config import ApiKey, FineTuningConfig, Scope, ServerConfig
from jlorax.defaults import Machine
from jlorax.errors import (
    ConfigError,
    InvalidParameter,
    NotFound,
    RequestCancelled,
    TrainingConflict,
    TrainingFailed,
)
from jlorax.jobs import book, files
from jlorax.jobs.book import JobBook
from jlorax.jobs.files import FileStore, IncomingFile
from jlorax.jobs.orders import OPEN_KEYS
from jlorax.jobs.service import Served, TrainingJobs, by_file_id
from jlorax.jobs.types import JobStatus, TrainingJob
from jlorax.training.config import DataConfig, TrainConfig
from jlorax.training.events import Began, Cancelled, Ended, Failed, Preparing, Saved, StepDone
from servers import card
from servers.rest import bound_port, create_app, create_runner
from servers.settings import engine_config, fine_tuning_config
from tests import tiny_llama
from tests.fakes import FakeEngine
from tests.servers.process import ServerProcess, start_server
from tests.servers.serving import Answer, Server, in_loop
from tests.servers.test_auth import KEYS, B, bearer, digest
from tests.servers.test_openapi import check

ROWS = [
    {"prompt": f"w{3 + i % 20} w5", "completion": f"w{9 + i % 7} w{30 + i % 20}"} for i in range(12)
]
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
SMALL: dict[str, Any] = {
    "rank": 4,
    "epochs": 1,
    "batch_size": 4,
    "max_seq_len": 32,
    "packing": False,
    "validation_fraction": 0,
    "learning_rate": 0.05,
}
LONG = SMALL | {"epochs": 10_000, "checkpoint_every_steps": 1_000_000}
JOBS = "/v1/fine_tuning/jobs"


def form(data: bytes = JSONL, name: str = "rows.jsonl", **fields: str) -> aiohttp.FormData:
    made = aiohttp.FormData()
    for key, value in ({"purpose": "fine-tune"} | fields).items():
        made.add_field(key, value)
    made.add_field("file", data, filename=name)
    return made


# ---- the routes in this process, with a place for trainings, but none that runs


@asynccontextmanager
async def serving(
    folder: Path, config: ServerConfig | None = None, store: FileStore | None = None, **changes: Any
) -> AsyncIterator[Server]:
    """``Server`` over the fake engine; jobs stay queued, for nobody runs them."""
    (folder / "root").mkdir(exist_ok=True)
    place = {"adapter_root": folder / "root", "max_file_bytes": 4096} | changes
    fine_tuning = FineTuningConfig(folder / "cache", folder / "files", **place)
    jobs = TrainingJobs(fine_tuning, Served("tiny/base", 16, 64))
    jobs.files = store or jobs.files
    jobs.run = _nobody  # type: ignore[method-assign]
    app = create_app(FakeEngine(), config or ServerConfig(), jobs=jobs)
    runner = create_runner(app)
    await runner.setup()
    await aiohttp.web.TCPSite(runner, "127.0.0.1", 0).start()
    port = bound_port(runner)
    try:
        async with aiohttp.ClientSession() as session:
            yield Server(FakeEngine(), f"http://127.0.0.1:{port}", port, runner, session)
    finally:
        await runner.cleanup()


async def _nobody() -> None:
    """Stands for ``TrainingJobs.run``."""


async def sent(server: Server, data: bytes = JSONL, **options: Any) -> str:
    answer = await server.call("POST", "/v1/files", data=form(data), **options)
    assert answer.status == 200, answer.text
    file_id: str = answer.json["id"]
    return file_id


async def created(server: Server, file_id: str, **fields: Any) -> Answer:
    return await server.post(JOBS, {"model": "", "training_file": file_id} | fields)


def left(folder: Path) -> list[Path]:
    """What the store holds, whole or not."""
    return [path for path in (folder / "files").rglob("*") if path.is_file()]


@in_loop
async def test_files_go_round(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        first = await server.call("POST", "/v1/files", data=form())
        check("FileObject", first.json)
        assert (first.json["bytes"], first.json["filename"]) == (len(JSONL), "rows.jsonl")
        assert await sent(server) == first.json["id"], "the same content is the same file"
        other = await sent(server, b'{"text": "w3"}\n')
        listed = (await server.get("/v1/files")).json
        check("FileList", listed)
        assert {file["id"] for file in listed["data"]} == {first.json["id"], other}
        one = f"/v1/files/{first.json['id']}"
        assert (await server.get(one)).json == first.json
        assert (await server.get(f"{one}/content")).text.encode() == JSONL
        deleted = await server.call("DELETE", one)
        check("FileDeleted", deleted.json)
        for method, path in (("GET", one), ("GET", f"{one}/content"), ("DELETE", one)):
            assert (await server.call(method, path)).status == 404
        assert [file["id"] for file in (await server.get("/v1/files")).json["data"]] == [other]
    assert {path.parent.name for path in left(tmp_path)} == {other}
    async with serving(tmp_path) as again:
        assert (await again.get(f"/v1/files/{other}")).status == 200, "they survive a restart"


@pytest.mark.parametrize(
    ("sent_form", "status", "words"),
    [
        (lambda: form(purpose="batch"), 400, "'batch'"),
        (lambda: form(purpose="fine-tune" * 100), 400, "fine-tune"),
        (lambda: form(b""), 400, "0 bytes"),
        (lambda: form(name="rows.exe"), 400, "rows.exe"),
        (lambda: form(name="x" * 300 + ".csv"), 400, "304"),
        (lambda: form(more="x"), 400, "more"),
        (lambda: form(b"x" * 4097), 413, "4096"),
        (lambda: form(b"x" * 200_000), 413, "4096"),
        (lambda: {"purpose": "fine-tune"}, 415, "multipart"),
    ],
)
@in_loop
async def test_a_wrong_form_leaves_nothing(
    tmp_path: Path, sent_form: Any, status: int, words: str
) -> None:
    async with serving(tmp_path) as server:
        answer = await server.call("POST", "/v1/files", data=sent_form())
        assert answer.status == status, answer.text
        assert words in answer.json["error"]["message"]
        check("OpenAIError", answer.json)
    assert not left(tmp_path)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"nothing",
        b"--b\r\n",
        b"--b\r\n26050755--b--\r\n",
        b"--b\r\nno header\r\n\r\nx\r\n--b--\r\n",
        b"--b\r\nA: " + b"a" * 10_000 + b"\r\n\r\nx\r\n--b--\r\n",
        b"--b\r\nContent-Disposition: form-data; name=file\r\n\r\nx",
        b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b--\r\n",
        b"--b\r\nContent-Type: multipart/mixed; boundary=c\r\n\r\n--c\r\n\r\nx\r\n--c--\r\n--b--",
        b"--b\r\nContent-Length: x\r\nContent-Disposition: form-data; name=file\r\n\r\nx\r\n--b--",
        b"--b\r\nContent-Length: 9\r\nContent-Disposition: form-data; name=file\r\n\r\nx\r\n--b--",
    ],
)
@in_loop
async def test_a_broken_form_is_told_and_leaves_nothing(tmp_path: Path, body: bytes) -> None:
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    async with serving(tmp_path) as server:
        answer = await server.call("POST", "/v1/files", data=body, headers=headers)
        assert answer.status == 400, answer.text
        bare = {"Content-Type": "multipart/form-data"}
        assert (await server.call("POST", "/v1/files", data=b"x", headers=bare)).status == 400
    assert not left(tmp_path)


class WatchedStore(FileStore):
    """Tells when a file begins to come, and when it is gone again."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.began, self.gone = asyncio.Event(), asyncio.Event()

    @contextmanager
    def receiving(self, tenant: str, filename: str) -> Iterator[IncomingFile]:
        try:
            with super().receiving(tenant, filename) as incoming:
                self.began.set()
                yield incoming
        finally:
            self.gone.set()


@in_loop
async def test_an_upload_that_is_broken_off_leaves_nothing(tmp_path: Path) -> None:
    store = WatchedStore(tmp_path / "files")
    async with serving(tmp_path, store=store) as server:
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        head = "POST /v1/files HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3000\r\n"
        part = 'Content-Disposition: form-data; name="file"; filename="a.csv"'
        body = f"--b\r\n{part}\r\n\r\nx,y\r\n" + "z" * 1000
        kind = "Content-Type: multipart/form-data; boundary=b\r\n\r\n"
        writer.write((head + kind + body).encode())
        await store.began.wait()
        assert left(tmp_path)
        writer.transport.abort()
        await store.gone.wait()
    assert not left(tmp_path)


@in_loop
async def test_a_full_disk_is_507(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Any, chunk: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.IncomingFile, "write", full)
    async with serving(tmp_path) as server:
        answer = await server.call("POST", "/v1/files", data=form())
        assert (answer.status, answer.json["error"]["code"]) == (507, "storage_full")
    assert not left(tmp_path)


def test_what_was_left_half_written_is_swept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FileStore(tmp_path)
    with store.receiving("a", "x.csv") as incoming:
        incoming.write(b"x")
        store.sweep()
        assert list(tmp_path.glob("a/.arriving-*")), "somebody is still sending it"
        monkeypatch.setattr(files, "ABANDONED_S", -1.0)
        store.sweep()
        assert not list(tmp_path.glob("a/.arriving-*"))


@pytest.mark.parametrize(
    "file_id", ["file-1", "..", "default", f"file-{'0' * 32}", "file-../../x", "%2e%2e", "a%2fb"]
)
@in_loop
async def test_an_unknown_file_is_404_and_no_path(tmp_path: Path, file_id: str) -> None:
    async with serving(tmp_path) as server:
        await sent(server)
        for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/content")):
            answer = await server.call(method, f"/v1/files/{file_id}{path}")
            assert answer.status == 404, answer.text
        assert (await created(server, file_id)).status == 404
        good = await sent(server)
        assert (await created(server, good, validation_file=file_id)).status == 404


WRONG_JOBS: list[tuple[dict[str, Any], int, str]] = [
    ({"model": "other"}, 400, "tiny/base"),
    ({"model": None}, 400, "model"),
    ({"training_file": 3}, 400, "training_file"),
    ({"suffix": "../x"}, 400, "'../x'"),
    ({"suffix": "/etc"}, 400, "/etc"),
    ({"suffix": "a/../b"}, 400, "a/../b"),
    ({"suffix": ".training"}, 400, ".training"),
    ({"suffix": "tiny/base"}, 409, "base model"),
    ({"suffix": "one"}, 409, "'one' is an adapter"),
    ({"suffix": "one/more"}, 409, "'one' is an adapter"),
    ({"seed": -1}, 400, "seed"),
    ({"hyperparameters": {"n_epochs": 0}}, 400, "n_epochs"),
    ({"hyperparameters": {"n_epoch": 1}}, 400, "n_epochs"),
    ({"hyperparameters": {"n_epoch": "auto"}}, 400, "n_epochs"),
    ({"hyperparameters": {"batch_size": 10**9}}, 400, "batch_size"),
    ({"hyperparameters": {"learning_rate_multiplier": 0}}, 400, "learning_rate_multiplier"),
    ({"hyperparameters": [1]}, 400, "hyperparameters"),
    ({"method": {"type": "dpo"}}, 400, "'dpo'"),
    ({"method": {"type": "supervised", "dpo": {}}}, 400, "method.dpo"),
    (
        {
            "hyperparameters": {"n_epochs": 1},
            "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2}}},
        },
        400,
        "n_epochs",
    ),
    ({"training": {"epochs": 1}, "hyperparameters": {"n_epochs": 2}}, 400, "training.epochs"),
    ({"training": {"ranks": 4}}, 400, "'rank'"),
    ({"training": {"rank": 999}}, 400, "1 to 256"),
    ({"training": {"rank": 17}}, 400, "17; this server serves adapters of at most 16"),
    ({"training": {"rank_pattern": {"q_proj": 32}}}, 400, "32"),
    ({"training": {"learning_rate": "fast"}}, 400, "fast"),
    ({"training": 3}, 400, "training"),
    *(
        ({"training": {key: "/etc/passwd"}}, 400, "server to decide")
        for key in ("dataset", "validation", "root", "name", "output_root", "log_dir", "base")
    ),
    ({"metadata": {"a": 1}}, 400, "metadata"),
    ({"metadata": {"a": "x" * 513}}, 400, "513"),
    ({"metadata": {str(i): "" for i in range(17)}}, 400, "17"),
    ({"integrations": [{"type": "wandb"}]}, 400, "integrations"),
]


@in_loop
async def test_a_wrong_job_is_refused_with_what_is_wrong(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        tiny_llama.write_adapter(tmp_path / "root" / "one", 1)
        file_id = await sent(server)
        for fields, status, words in WRONG_JOBS:
            answer = await created(server, file_id, **fields)
            assert answer.status == status, (fields, answer.text)
            assert words in answer.json["error"]["message"], (fields, answer.text)
        assert (await server.get(JOBS)).json["data"] == []


@in_loop
async def test_a_job_says_what_it_will_do(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        file_id = await sent(server)
        answer = await created(
            server,
            file_id,
            suffix="team/support",
            seed=7,
            hyperparameters={"n_epochs": "auto", "batch_size": 2},
            method={
                "type": "supervised",
                "supervised": {"hyperparameters": {"learning_rate_multiplier": 2}},
            },
            training={"rank": 8, "targets": ["q_proj"], "alpha": None},
            metadata={"who": "me"},
        )
        job = answer.json
        check("FineTuningJob", job)
        expected = {"n_epochs": 3, "batch_size": 2, "learning_rate_multiplier": 2.0}
        assert job["hyperparameters"] == expected
        assert (job["status"], job["seed"], job["metadata"]) == ("queued", 7, {"who": "me"})
        assert set(job["training"]) == set(OPEN_KEYS)
        assert job["training"]["learning_rate"] == 4e-4
        assert job["training"]["targets"] == ["q_proj"]
        assert job["training"]["max_seq_len"] == 64, "no longer than what is served"
        assert str(tmp_path) not in answer.text
        (event,) = (await server.get(f"{JOBS}/{job['id']}/events")).json["data"]
        check("FineTuningJobEvent", event)
        unnamed = (await created(server, file_id)).json
        assert unnamed["user_provided_suffix"].startswith("ft-")


@in_loop
async def test_jobs_come_by_pages_and_by_metadata(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_fine_tuning, "_JOBS_A_PAGE", 2)
    async with serving(tmp_path) as server:
        file_id = await sent(server)
        made = [
            (await created(server, file_id, metadata={"n": str(i % 2)})).json["id"]
            for i in range(5)
        ]
        first = (await server.get(f"{JOBS}?limit=2")).json
        check("FineTuningJobList", first)
        assert [job["id"] for job in first["data"]] == [made[4], made[3]]
        assert first["has_more"]
        last = (await server.get(f"{JOBS}?limit=3&after={first['last_id']}")).json
        assert ([job["id"] for job in last["data"]], last["has_more"]) == (made[2::-1], False)
        async with jlorax.AsyncClient(server.url) as client:
            assert [job.job_id for job in await client.finetune_jobs()] == made[::-1]
        odd = (await server.get(f"{JOBS}?metadata[n]=1")).json["data"]
        assert [job["id"] for job in odd] == [made[3], made[1]]
        for query in ("limit=0", "limit=1001", "limit=x", "after=nobody"):
            assert (await server.get(f"{JOBS}?{query}")).status == 400, query
        for path in ("", "/events"):
            assert (await server.get(f"{JOBS}/ftjob-1{path}")).status == 404
        assert (await server.get(f"{JOBS}/ftjob-1/events?stream=true")).status == 404
        assert (await server.post(f"{JOBS}/ftjob-1/cancel", {})).status == 404


@in_loop
async def test_what_waits_keeps_its_name_and_file_until_it_is_cancelled(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        file_id = await sent(server)
        job = (await created(server, file_id, suffix="support")).json
        again = await created(server, file_id, suffix="support")
        assert (again.status, again.json["error"]["code"]) == (409, "training_conflict")
        assert job["id"] in again.json["error"]["message"]
        assert (await server.call("DELETE", f"/v1/files/{file_id}")).status == 409
        cancel = f"{JOBS}/{job['id']}/cancel"
        cancelled = await server.post(cancel, {})
        assert (cancelled.status, cancelled.json["status"]) == (200, "cancelled")
        assert (await server.post(cancel, {})).status == 409
        watched = await server.get(f"{JOBS}/{job['id']}/events?stream=true")
        assert [event["level"] for event in watched.events[:-1]] == ["info", "warn"]
        assert watched.events[-1] == "[DONE]"
        assert (await created(server, file_id, suffix="support")).status == 200


@in_loop
async def test_a_queue_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jlorax.jobs.service.MAX_QUEUED", 2)
    async with serving(tmp_path) as server:
        file_id = await sent(server)
        statuses = [(await created(server, file_id)).status for _ in range(3)]
        assert statuses == [200, 200, 429]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"adapter_root": None}, "--adapter-root"),
        ({"is_on_gpu": True}, "--train-memory-bytes"),
    ],
)
@in_loop
async def test_a_server_that_cannot_train_says_what_it_needs(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    async with serving(tmp_path, **changes) as server:
        answer = await created(server, await sent(server))
        assert answer.status == 409
        assert words in answer.json["error"]["message"]
    async with serving(tmp_path, is_on_gpu=True, device_share=0.2) as server:
        assert (await created(server, await sent(server))).status == 200


OPERATOR = "key-of-default"


@in_loop
async def test_a_tenants_files_are_its_own_and_default_alone_trains(tmp_path: Path) -> None:
    keys = {**KEYS, digest(OPERATOR): ApiKey("default", frozenset({Scope.ADMIN}))}
    config = ServerConfig(api_keys=keys)
    async with serving(tmp_path, config, is_shared=True) as server:
        mine = await sent(server, headers=bearer(B))
        body = {"model": "", "training_file": mine}
        refused = await server.post(JOBS, body, headers=bearer(B))
        assert refused.status == 403
        assert "'default'" in refused.json["error"]["message"]
        assert (await server.post(JOBS, body, headers=bearer(OPERATOR))).status == 404
        for path in (f"/v1/files/{mine}", f"/v1/files/{mine}/content"):
            assert (await server.get(path, headers=bearer(B))).status == 200
            assert (await server.get(path, headers=bearer(OPERATOR))).status == 404
        assert (await server.get("/v1/files", headers=bearer(OPERATOR))).json["data"] == []
        body["training_file"] = await sent(server, JSONL[:-1], headers=bearer(OPERATOR))
        job = (await server.post(JOBS, body, headers=bearer(OPERATOR))).json["id"]
        for path in ("", "/events", "/events?stream=true"):
            assert (await server.get(f"{JOBS}/{job}{path}", headers=bearer(B))).status == 404
        assert (await server.get(JOBS, headers=bearer(B))).json["data"] == []
        gone = await server.call("DELETE", f"/v1/files/{mine}", headers=bearer(OPERATOR))
        assert gone.status == 404


# ---- the book


def job(job_id: str, status: JobStatus = JobStatus.QUEUED) -> TrainingJob:
    return TrainingJob(job_id, "default", "base", job_id, "f", None, 1.0, {}, {}, 0, status)


def test_the_oldest_that_have_ended_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(book, "MAX_JOBS", 2)
    jobs = JobBook(lambda: 0.0)
    for name, status in (
        ("a", JobStatus.RUNNING),
        ("b", JobStatus.FAILED),
        ("c", JobStatus.FAILED),
    ):
        jobs.add(job(name, status))
    assert [one.job_id for one in jobs.jobs()] == ["c", "a"]
    with pytest.raises(NotFound, match="'b'"):
        jobs.find("b")


def test_a_failure_names_data_by_its_id() -> None:
    config = TrainConfig(DataConfig("/secret/a.csv", validation="/secret/b.csv"))
    told = replace(job("a"), training_file="file-1", validation_file="file-2")
    failed = Failed("config", "'/secret/a.csv' has none, '/secret/b.csv' has none")
    named = by_file_id(failed, told, config)
    assert isinstance(named, Failed)
    assert named.message == "'file-1' has none, 'file-2' has none"


def test_events_become_a_jobs_state() -> None:
    jobs = JobBook(lambda: 100.0)
    jobs.add(job("a"))
    jobs.start("a")
    assert jobs.find("a").status is JobStatus.VALIDATING
    jobs.take("a", Began(0, 10, 5, {"num_tokens": 40}))
    jobs.take("a", StepDone(5, 0.5, float("inf"), 0.1, 1.0, 9.0, 20.4))
    seen = jobs.find("a")
    assert (seen.status, seen.num_trained_tokens) == (JobStatus.RUNNING, 20)
    assert seen.estimated_finish_s == 120
    jobs.take("a", Saved(5))
    jobs.take("a", Ended("finished", "a/1", "/secret/a/1", {"train_loss": 0.5}))
    ended = jobs.find("a")
    assert (ended.status, ended.adapter_id, ended.finished_s) == (JobStatus.SUCCEEDED, "a/1", 100)
    events = jobs.events("a")
    assert [event.number for event in events] == list(range(1, len(events) + 1))
    assert "/secret" not in str(events)


# ---- memory of a GPU


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What tells of a card of 1000 MiB, and writes down what it was asked."""
    program = tmp_path / "nvidia-smi"
    program.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\necho 1000\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    return tmp_path / "asked"


def test_the_share_of_a_card_is_what_nvidia_smi_tells(nvidia_smi: Path) -> None:
    assert card.share(250 << 20, {}) == 0.25
    assert "-i" not in nvidia_smi.read_text()
    assert card.share(250 << 20, {"CUDA_VISIBLE_DEVICES": "3,1"}) == 0.25
    assert nvidia_smi.read_text().startswith("-i 3 ")
    assert card.share(None, {}) is None
    for too_much in (0, 900 << 20):
        with pytest.raises(ConfigError, match=str(1000 << 20)):
            card.share(too_much, {})


def test_the_server_takes_that_much_less(monkeypatch: pytest.MonkeyPatch) -> None:
    from servers import cli

    for name in cli._MEMORY_FRACTIONS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "")  # so that it is put back afterwards
    monkeypatch.delenv("XLA_CLIENT_MEM_FRACTION")
    cli._take_the_card(0.25)
    assert cli.os.environ["XLA_CLIENT_MEM_FRACTION"] == "0.6700"


def test_the_share_matters_on_a_gpu_alone() -> None:
    values = {"train_memory_bytes": 1 << 30, "adapter_root": Path("root")}
    cpu, gpu = Machine("cpu"), Machine("gpu", 1 << 34)
    engine = engine_config(values, {"XDG_CACHE_HOME": "/c"}, cpu, True)
    on_cpu = fine_tuning_config(values, engine, cpu, None)
    assert (on_cpu.is_on_gpu, on_cpu.device_share, on_cpu.is_shared) == (False, None, True)
    assert (on_cpu.files_dir, on_cpu.adapter_root) == (Path("/c/jlorax/files"), Path("root"))
    on_gpu = fine_tuning_config(values, engine, gpu, 0.25)
    assert (on_gpu.is_on_gpu, on_gpu.device_share) == (True, 0.25)
    with pytest.raises(ConfigError, match="nvidia-smi"):
        fine_tuning_config(values, engine, gpu, None)


# ---- a real server process, and trainings in processes of theirs


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    tiny_llama.write_model(home / "tiny")
    (home / "root").mkdir()
    return home


def start(home: Path) -> ServerProcess:
    return start_server(
        home,
        *("--model", str(home / "tiny"), "--cache-dir", str(home / "cache")),
        *("--adapter-root", str(home / "root"), "--max-slots", "2", "--max-batch", "4"),
        *("--max-seq-len", "64", "--adapter-bank-bytes", "8MiB", "--buckets", "4"),
        env={"JAX_PLATFORMS": "cpu"},
    )


@pytest.fixture(scope="module")
def server(home: Path) -> Iterator[ServerProcess]:
    server = start(home)
    yield server
    server.process.kill()
    server.process.wait()


def test_from_rows_to_answers_without_a_restart(server: ServerProcess, home: Path) -> None:
    with jlorax.Client(server.url) as client:
        job = client.start_finetune(ROWS, name="small", **SMALL)
        events = list(job.watch())
        made = job.result()
        assert made.adapter_id == "small/1"
        steps = [event for event in events if isinstance(event, StepDone)]
        assert [step.step for step in steps] == [1, 2, 3]
        assert made.metrics["train_loss"] == steps[-1].loss
        options: dict[str, Any] = {"max_new_tokens": 8, "ignore_eos": True}
        adapted = client.generate("w3 w5", adapter_id="small/1", **options)
        assert adapted.text != client.generate("w3 w5", **options).text
        state = job.state()
        assert (state.status, state.adapter_id) == (JobStatus.SUCCEEDED, "small/1")
        assert state.num_trained_tokens and state.finished_s
        assert [one.job_id for one in client.finetune_jobs()] == [job.job_id]
        assert "small/1" in {model.id for model in client.models()}
    assert (home / "root" / "small" / "1" / "training.json").is_file()
    listed = server.request(f"{JOBS}/{job.job_id}/events?limit=2")[2]
    check("FineTuningJobEventList", listed)
    assert listed["data"][0]["event"]["event"] == "ended"
    assert str(home) not in json.dumps(server.request(f"{JOBS}/{job.job_id}/events?limit=99")[2])
    check("FineTuningJob", server.request(f"{JOBS}/{job.job_id}")[2])


def test_bad_rows_fail_the_job_and_name_the_row(server: ServerProcess, home: Path) -> None:
    bad = home / "bad.jsonl"
    bad.write_bytes(JSONL + b'{"prompt": \n')
    with jlorax.Client(server.url) as client:
        with pytest.raises(TrainingFailed, match="row 13 of the data is no JSON") as caught:
            client.finetune(bad, name="bad", **SMALL)
        assert caught.value.code == "data_invalid"
        assert client.finetune_jobs()[0].status is JobStatus.FAILED
    assert not (home / "root" / "bad").exists()


@pytest.mark.slow
def test_a_running_job_is_cancelled_with_a_checkpoint(server: ServerProcess, home: Path) -> None:
    with jlorax.Client(server.url) as client:
        running = client.start_finetune(ROWS, name="long", **LONG)
        waiting = client.start_finetune(ROWS, name="waiting", **LONG)
        with pytest.raises(TrainingConflict, match="long"):
            client.start_finetune(ROWS, name="long", **LONG)
        for event in running.watch():
            if isinstance(event, StepDone):
                break
        assert waiting.state().status is JobStatus.QUEUED
        assert waiting.cancel().status is JobStatus.CANCELLED
        assert running.cancel().status is JobStatus.CANCELLED
        with pytest.raises(RequestCancelled):
            running.result()
        assert [event for event in running.watch() if isinstance(event, Saved)]
        with pytest.raises(TrainingConflict, match="ended already: cancelled"):
            running.cancel()
        with pytest.raises(InvalidParameter, match="'rank'"):
            client.start_finetune(ROWS, name="x", ranks=3)
    assert not (home / "root" / "long").exists()


def trainer_of(server: ServerProcess) -> int:
    """The process id of the training that runs."""
    for children in Path("/proc").glob(f"{server.process.pid}/task/*/children"):
        for pid in children.read_text().split():
            if b"jlorax.training" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return int(pid)
    raise AssertionError("no training runs")


@pytest.mark.slow
def test_a_training_that_is_killed_has_failed(server: ServerProcess) -> None:
    with jlorax.Client(server.url) as client:
        job = client.start_finetune(ROWS, name="killed", **SMALL)
        assert isinstance(next(job.watch()), Preparing)
        os.kill(trainer_of(server), signal.SIGKILL)
        with pytest.raises(TrainingFailed, match="SIGKILL"):
            job.result()


def test_who_gives_up_waiting_cancels(server: ServerProcess) -> None:
    async def give_up() -> JobStatus:
        async with jlorax.AsyncClient(server.url) as client:
            waiting = asyncio.create_task(client.finetune(ROWS, name="left", **LONG))
            while not (jobs := [one for one in await client.finetune_jobs() if one.name == "left"]):
                pass
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            found = {one.job_id: one for one in await client.finetune_jobs()}
            return found[jobs[0].job_id].status

    assert asyncio.run(give_up()) is JobStatus.CANCELLED


@pytest.mark.slow
def test_a_server_that_stops_ends_its_training_with_a_checkpoint(
    server: ServerProcess, home: Path
) -> None:
    with jlorax.Client(server.url) as client:
        job = client.start_finetune(ROWS, name="stopped", **LONG)
        events = job.watch()
        assert any(isinstance(event, StepDone) for event in events)
        trainer = trainer_of(server)
        server.process.send_signal(signal.SIGTERM)
        *_, saved, last = events
        assert isinstance(saved, Saved) and isinstance(last, Cancelled)
    assert server.process.wait(30) == 0
    assert not Path(f"/proc/{trainer}").exists()
    assert list((home / "root" / ".training" / "stopped" / "steps").iterdir())
