"""jlorax.LLM: the engine in this process, blocking, over a tiny random Llama."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import jlorax
from jlorax.errors import (
    AdapterNotFound,
    InvalidParameter,
    JLoraxError,
    PromptTooLong,
)
from jlorax.types import AdapterMerge, Constraint, ConstraintKind, GenerateResult, Tier
from servers.settings import SETTINGS
from tests.servers.process import D, write_adapter, write_model

PROMPTS = ["Hello", "x", "yes and no", "one"]
SHAPES: dict[str, Any] = {
    "max_seq_len": 64,
    "max_batch": 4,
    "max_queued": 4,
    "buckets": [4],
    "max_slots": 2,
    "adapter_bank_bytes": 1 << 20,
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    write_model(home / "model")
    write_adapter(home / "one", 1)
    write_adapter(home / "root" / "two", 2)
    return home


def arguments(home: Path) -> dict[str, Any]:
    """Always of the same shapes, so that the executables are compiled once."""
    folders = {"cache_dir": str(home / "cache"), "adapter_root": str(home / "root")}
    adapters = {"one": str(home / "one")}
    return {"model": str(home / "model"), "adapters": adapters, **folders, **SHAPES}


@pytest.fixture(scope="module")
def llm(home: Path) -> Iterator[jlorax.LLM]:
    with jlorax.LLM(**arguments(home)) as llm:
        yield llm


def ids(result: GenerateResult) -> list[int]:
    return [token.id for token in result.tokens]


def test_a_batch_gets_what_each_prompt_gets_alone(llm: jlorax.LLM) -> None:
    names = [None, "one", "two", None]
    alone = [
        llm.generate(prompt, adapter_id=name, max_new_tokens=6)
        for prompt, name in zip(PROMPTS, names, strict=True)
    ]
    together = llm.generate(PROMPTS, adapter_ids=names, max_new_tokens=6)
    assert [ids(result) for result in together] == [ids(result) for result in alone]
    base = llm.generate(PROMPTS, max_new_tokens=6)
    assert [ids(b) == ids(t) for b, t in zip(base, together, strict=True)] == [
        True,
        False,
        False,
        True,
    ]


def test_token_ids_are_a_prompt_and_lists_of_them_are_prompts(llm: jlorax.LLM) -> None:
    one = llm.generate([5, 6], max_new_tokens=3)
    assert one.prompt_token_ids == (5, 6)
    both = llm.generate([[5, 6], [7]], max_new_tokens=3)
    assert [result.prompt_token_ids for result in both] == [(5, 6), (7,)]
    assert ids(both[0]) == ids(one)
    assert llm.generate([], max_new_tokens=3) == []


def test_more_prompts_than_may_wait_wait_here(llm: jlorax.LLM) -> None:
    prompts = [f"w{3 + i % 40}" for i in range(30)]
    assert len(llm.generate(prompts, max_new_tokens=2)) == 30 > SHAPES["max_queued"]


def test_a_stream_gives_the_events_and_the_result(llm: jlorax.LLM) -> None:
    events = list(llm.stream("w3 w4", max_new_tokens=5))
    result = events[-1].result
    assert result is not None
    assert ids(result) == [event.token.id for event in events]
    assert ids(result) == ids(llm.generate("w3 w4", max_new_tokens=5))


def test_leaving_a_stream_cancels_the_request(llm: jlorax.LLM) -> None:
    for event in llm.stream("w3", ignore_eos=True):
        if event.index == 1:
            break
    for _ in range(200):
        if llm.stats().num_running == 0:
            return
        llm.generate("w4", max_new_tokens=1)
    raise AssertionError("the request goes on")


def test_a_chat_goes_through_the_template(llm: jlorax.LLM) -> None:
    said = [{"role": "user", "content": "hi"}]
    result = llm.chat(said, max_new_tokens=3)
    rendered = llm.tokenize("<|user|>hi<|assistant|>", add_special_tokens=False)
    assert list(result.prompt_token_ids) == [piece.id for piece in rendered]
    last = list(llm.stream_chat(said, max_new_tokens=3))[-1].result
    assert last is not None and ids(last) == ids(result)
    other = [*said, {"role": "assistant", "content": "x"}, {"role": "user", "content": "y"}]
    both = llm.chat([said, other], adapter_ids=[None, "one"], max_new_tokens=3)
    assert ids(both[0]) == ids(result)
    assert ids(both[1]) == ids(llm.chat(other, adapter_id="one", max_new_tokens=3))
    (piece,) = llm.tokenize("a", add_special_tokens=False)
    forced: Any = {"logit_bias": {piece.id: 100.0}, "max_new_tokens": 3, "stop": "a"}
    assert llm.chat(said, **forced).text == ""  # as OpenAI has it
    assert llm.generate("hi", **forced).text == "a"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": -1}, r"temperature.*-1"),
        ({"top_p": 7.0}, r"top_p.*7"),
        ({"max_new_tokens": 0}, r"max_new_tokens.*0"),
        ({"adapter_ids": [None]}, r"adapter_ids"),
    ],
)
def test_bad_options_are_refused_as_the_server_refuses_them(
    llm: jlorax.LLM, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(InvalidParameter, match=words):
        llm.generate("w3", **options)


def test_what_a_request_may_say_is_done(llm: jlorax.LLM) -> None:
    chosen = Constraint(ConstraintKind.CHOICE, '["yes","no"]')
    assert llm.generate("w3", constraint=chosen, max_new_tokens=9).text in ("yes", "no")
    form = {"type": "json_object"}
    assert llm.generate("w3", response_format=form, max_new_tokens=9).text.startswith("{")
    scored = llm.generate("w3 w4", prompt_logprobs=True, max_new_tokens=1)
    assert [token.logprob is None for token in scored.prompt_tokens] == [True, *[False] * 4]
    forced = llm.generate("w3", logit_bias={9: 100.0}, max_new_tokens=2)
    assert ids(forced) == [9, 9]
    merge = AdapterMerge(("one", "two"), (1.0, 0.0))
    one = llm.generate("w3 w4", adapter_id="one", max_new_tokens=4)
    assert ids(llm.generate("w3 w4", merge=merge, max_new_tokens=4)) == ids(one)


def test_a_prompt_is_truncated_before_it_is_found_too_long(llm: jlorax.LLM) -> None:
    long = "x" * 100 + "Hello"
    with pytest.raises(PromptTooLong):
        llm.generate(long, max_new_tokens=2)
    cut = llm.generate(long, truncate=5, max_new_tokens=2)
    assert cut.prompt_token_ids == llm.generate("Hello", max_new_tokens=2).prompt_token_ids


def test_embeddings(llm: jlorax.LLM) -> None:
    base, other = llm.embed(["w3 w4", "longer than that"])
    assert len(base) == len(other) == D
    assert base != other
    assert llm.embed(["w3 w4"]) == [base]
    assert len(llm.embed([[5, 6], [7]])) == 2
    assert llm.embed(["w3 w4"], adapter_id="one") != [base]
    with pytest.raises(AdapterNotFound):
        llm.embed(["w3"], adapter_id="nobody")
    with pytest.raises(InvalidParameter, match="empty"):
        llm.embed([""])


def test_errors_are_typed(llm: jlorax.LLM) -> None:
    with pytest.raises(AdapterNotFound, match="nobody"):
        llm.generate(["w3", "w4"], adapter_ids=[None, "nobody"])
    with pytest.raises(PromptTooLong) as caught:
        llm.generate("w3", max_new_tokens=1000)
    assert caught.value.max_tokens == 64
    with pytest.raises(InvalidParameter, match="for each of 2 prompts"):
        llm.generate(["w3", "w4"], adapter_ids=["one"])
    with pytest.raises(TypeError, match="temprature"):
        llm.generate("w3", temprature=1)  # type: ignore[call-overload]
    assert llm.generate("w3", max_new_tokens=1).tokens


def test_adapters_come_and_go(llm: jlorax.LLM) -> None:
    assert llm.load_adapter("three", "two").adapter_id == "three"
    assert {info.adapter_id for info in llm.adapters()} >= {"one", "two", "three"}
    answer = llm.generate("w3 w4", adapter_id="three", max_new_tokens=4)
    assert ids(answer) == ids(llm.generate("w3 w4", adapter_id="two", max_new_tokens=4))
    assert llm.prefetch_adapter("three").tier in (Tier.HOST, Tier.DEVICE)
    assert llm.pin_adapter("three").pinned
    assert not llm.pin_adapter("three", pinned=False).pinned
    llm.unload_adapter("three")
    with pytest.raises(AdapterNotFound):
        llm.unload_adapter("three")


def test_several_threads_may_use_it(llm: jlorax.LLM) -> None:
    answers: dict[int, list[int]] = {}

    def ask(i: int) -> None:
        answers[i] = ids(llm.generate(PROMPTS[i % 4], max_new_tokens=4))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(answers[i] == answers[i % 4] for i in range(8))


def test_tokenize_says_where_each_token_is(llm: jlorax.LLM) -> None:
    pieces = llm.tokenize("ab", add_special_tokens=False)
    assert [(p.text, p.start, p.stop) for p in pieces] == [("a", 0, 1), ("b", 1, 2)]


def test_closing_ends_what_runs_and_all_verbs(home: Path) -> None:
    llm = jlorax.LLM(**arguments(home))
    events = llm.stream("w3", ignore_eos=True)
    next(events)
    assert gc.get_freeze_count() > 0
    llm.close()
    assert gc.get_freeze_count() == 0  # the engine was stopped, not only cut off
    with pytest.raises(JLoraxError):
        list(events)
    with pytest.raises(JLoraxError, match="this LLM is closed"):
        llm.generate("w3")
    llm.close()


def test_a_start_that_fails_raises_what_failed(home: Path, tmp_path: Path) -> None:
    before = threading.active_count()
    with pytest.raises(JLoraxError, match="nowhere"):
        jlorax.LLM(tmp_path / "nowhere", cache_dir=home / "cache")
    with pytest.raises(TypeError, match="max_slot"):
        jlorax.LLM(home / "model", max_slot=1)  # type: ignore[call-arg]
    assert threading.active_count() <= before


def test_settings_are_the_servers() -> None:
    from jlorax.llm import Settings

    of_the_front = {"host", "port", "api_keys", "max_best_of", "strict_fields"}
    arguments = {"model", "adapter"}
    of_tenants = {"tenant_weight"}
    of_trainings = {"files_dir", "max_file_bytes", "train_memory_bytes"}
    shared = {s.key for s in SETTINGS if not s.key.startswith("cors_")}
    assert (
        set(Settings.__annotations__)
        == shared - of_the_front - of_tenants - of_trainings - arguments
    )


def test_a_script_that_forgets_to_close_ends(home: Path) -> None:
    code = (
        "import jlorax, sys\n"
        "assert 'jax' not in sys.modules\n"
        f"llm = jlorax.LLM(**{arguments(home)!r})\n"
        "print(len(llm.generate('w3', max_new_tokens=2).tokens))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout) == (0, "2\n"), done.stderr
