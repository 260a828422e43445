"""Completions and chats, in: what is refused and how, and what absent and harmless fields mean."""

from __future__ import annotations

from typing import Any

import pytest

from jlorax.errors import InvalidParameter
from jlorax.wire.openai import parse_completion
from tests.wire_calls import LIMITS, USER, chat, completion, completion_call

# field: values that are refused
BAD_V1: dict[str, list[Any]] = {
    "adapter_parameters": [{"ids": ["a"]}],
    "allowed_token_ids": [[1]],
    "bad_words": [["x"]],
    "frequency_penalty": [-2.1, 3],
    "ignore_eos": ["yes"],
    "include_stop_str_in_output": [1],
    "length_penalty": [0.5, 2],
    "logits_processors": [["x"]],
    "max_completion_tokens": [0],
    "max_tokens": [0, -1, 2**31, 2**63, 1.0, "5", True],
    "metadata": [{str(i): "x" for i in range(10_000)}, []],
    "min_p": [-0.1, 2],
    "min_tokens": [-1, 2**31, 1.5],
    "n": [0, -1, 10**9, 9, 1.5, "2", True],
    "presence_penalty": [3],
    "prompt_logprobs": [0, 1, 1000],
    "reasoning_effort": ["high"],
    "repetition_penalty": [0, -1, 1e-300],
    "seed": [-1, 2**65, "x", 0.5],
    "service_tier": ["flex"],
    "skip_special_tokens": [False],
    "stop": [["a"] * 1000, [""], "", ["x" * 1_000_000], [1], {}],
    "stop_token_ids": [[1000], [-1], [1.5], [True], "1"],
    "store": ["yes"],
    "stream": ["yes", 1],
    "stream_options": [{"include_usage": True}, {}, []],
    "suffix": ["x"],
    "temperature": [-1, -0.1, 1e308, "hot", True, []],
    "top_k": [-5, 2**40, 1.5],
    "top_p": [0, -0.0, 1.1, "x"],
    "truncate_prompt_tokens": [5, -1],
    "typical_p": [0, 1.1],
    "use_beam_search": [True],
    "user": ["x" * 5000, 1],
    "verbosity": ["high"],
    "watermark": [True],
}
BAD_COMPLETION: dict[str, list[Any]] = {
    **BAD_V1,
    "add_special_tokens": [1],
    "best_of": [0, -1, 10**6, 9, "2", True, 1.5],
    "function_call": [{"name": "f"}],
    "functions": [[{"name": "f"}]],
    "logprobs": [-1, 21, 10**6, True],
    "prompt": [
        "", [], None, [""], ["a"] * 9, ["a"] * 10_000, [1, "a"], ["a", 1], [[1], "a"], [[]],
        [1000], [-1], [1.5], [True], [[1000]], {}, 5, [None],
    ],
    "tool_choice": ["required", {"type": "function"}],
    "tools": [[{"type": "function"}]],
}  # fmt: skip
BAD_CHAT: dict[str, list[Any]] = {
    **BAD_V1,
    "add_generation_prompt": [1],
    "add_special_tokens": [True],
    "best_of": [2, 0, -1, "2"],
    "chat_template": ["{{ 1 }}"],
    "chat_template_kwargs": [[], "x"],
    "continue_final_message": [1],
    "documents": [{}, ["x"], [{"text": "x"}] * 257],
    "echo": [True],
    "guideline": ["x"],
    "logprobs": [1],
    "messages": [
        None,
        [],
        "hi",
        ["hi"],
        [USER] * 100_000,
        [{"role": "robot", "content": "x"}],
        [{"role": "function", "name": "f", "content": "x"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": []}],
        [{"role": "user"}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}],
        [{"role": "user", "content": [{"type": "input_audio"}]}],
        [{"role": "user", "content": [{"type": "text"}]}],
        [{"role": "user", "content": ["x"]}],
        [{"role": "assistant", "content": "x", "refusal": "no"}],
    ],
    "modalities": [["audio"]],
    "top_logprobs": [3, 21, -1, 10**6],
}


@pytest.mark.parametrize(("name", "bad"), [(k, v) for k, vs in BAD_COMPLETION.items() for v in vs])
def test_completions_refuse_by_name(name: str, bad: object) -> None:
    with pytest.raises(InvalidParameter) as caught:
        completion(**{name: bad})
    assert name in str(caught.value)
    assert len(str(caught.value)) < 300  # a huge value is not repeated


@pytest.mark.parametrize(("name", "bad"), [(k, v) for k, vs in BAD_CHAT.items() for v in vs])
def test_chat_refuses_by_name(name: str, bad: object) -> None:
    with pytest.raises(InvalidParameter) as caught:
        chat(**{name: bad})
    assert name in str(caught.value)
    assert len(str(caught.value)) < 300


def test_the_numbers_are_in_the_message() -> None:
    with pytest.raises(InvalidParameter, match=r"`top_p` must be > 0.0 and <= 1.0. Given: 7"):
        completion(top_p=7)
    with pytest.raises(InvalidParameter, match=r"at most 8 prompts, not 9"):
        completion(prompt=["a"] * 9)
    with pytest.raises(InvalidParameter, match=r"id 1000, but ids go from 0 to 999"):
        completion(prompt=[3, 1000])
    with pytest.raises(InvalidParameter, match="`n` is 5: with 2 prompts that makes 10 answers"):
        completion(prompt=["a", "b"], n=5)


def test_null_is_absent_everywhere() -> None:
    fields = [name for name in (*BAD_COMPLETION, *BAD_CHAT) if name not in ("prompt", "messages")]
    assert completion(**dict.fromkeys(fields)) == completion()
    assert chat(**dict.fromkeys(fields)) == chat()


def test_unknown_and_harmless_fields_change_nothing() -> None:
    call = completion_call(user="u", zzz=1)
    assert call.requests[0] == completion()
    assert call.unknown_fields == ("zzz",)
    shared = {
        "adapter_parameters": {},
        "allowed_token_ids": [],
        "bad_words": [],
        "best_of": 1,
        "functions": [],
        "include_stop_str_in_output": False,
        "length_penalty": 1.0,
        "logits_processors": [],
        "metadata": {"a": "b"},
        "min_tokens": 0,
        "n": 1,
        "prompt_cache_key": "k",
        "safety_identifier": "s",
        "service_tier": "auto",
        "skip_special_tokens": True,
        "store": True,
        "suffix": "",
        "tool_choice": "auto",
        "tools": [],
        "use_beam_search": False,
        "verbosity": "medium",
        "watermark": False,
    }
    of_chat = {
        "add_special_tokens": False,
        "add_generation_prompt": True,
        "continue_final_message": False,
        "chat_template_kwargs": {},
        "documents": [],
        "echo": False,
        "modalities": ["text"],
        "parallel_tool_calls": True,
    }
    assert completion(**shared) == completion()
    assert chat(**shared, **of_chat) == chat()


def test_sampling_is_at_one_unless_told_otherwise() -> None:
    assert completion().sampling.temperature == 1.0
    assert chat().requests[0].sampling.temperature == 1.0
    assert completion(temperature=0).sampling.temperature == 0.0
    assert completion(top_k=-1).sampling.top_k == 0


def test_every_sampling_field_arrives() -> None:
    request = completion(
        temperature=0.5, top_k=5, top_p=0.9, min_p=0.1, typical_p=0.8, repetition_penalty=1.2,
        frequency_penalty=0.3, presence_penalty=-0.4, seed=2**64 - 1, stop=["a", "b"],
        stop_token_ids=[4], ignore_eos=True, max_tokens=9, min_tokens=3,
        include_stop_str_in_output=True,
    )  # fmt: skip
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.5, 5, 0.9)
    assert (sampling.min_p, sampling.typical_p, sampling.repetition_penalty) == (0.1, 0.8, 1.2)
    assert (sampling.frequency_penalty, sampling.presence_penalty) == (0.3, -0.4)
    assert sampling.seed == 2**64 - 1
    assert (request.stop, request.stop_token_ids, request.ignore_eos) == (("a", "b"), (4,), True)
    assert (request.max_new_tokens, request.min_new_tokens) == (9, 3)
    assert request.include_stop_text
    assert not completion(stop="x").include_stop_text


def test_lengths_agree_or_are_refused() -> None:
    assert chat(max_completion_tokens=7).requests[0].max_new_tokens == 7
    assert chat(max_completion_tokens=7, max_tokens=7).requests[0].max_new_tokens == 7
    with pytest.raises(InvalidParameter, match="is 7, but `max_tokens` is 8"):
        chat(max_completion_tokens=7, max_tokens=8)
    with pytest.raises(InvalidParameter, match="`min_tokens` is 8, but at most 7 may come"):
        completion(max_tokens=7, min_tokens=8)
    assert completion(min_tokens=8).min_new_tokens == 8


def test_completions_may_leave_out_the_special_tokens() -> None:
    assert completion(add_special_tokens=True) == completion()
    assert not completion(add_special_tokens=False).add_special_tokens
    assert completion(prompt=[1], add_special_tokens=True) == completion(prompt=[1])


def test_prompts_of_every_form() -> None:
    def prompts(prompt: object, n: int = 1) -> list[object]:
        return [request.prompt for request in completion_call(prompt=prompt, n=n).requests]

    assert prompts("a") == ["a"]
    assert prompts(["a", "b"], n=2) == ["a", "a", "b", "b"]
    assert prompts([1, 2]) == [(1, 2)]
    assert prompts([[1], [2, 3]]) == [(1,), (2, 3)]
    assert prompts("  ") == ["  "]
    assert not completion(prompt=[1]).add_special_tokens


def test_samples_of_one_prompt_get_seeds_of_their_own() -> None:
    requests = completion_call(n=3, seed=5).requests
    assert [request.sampling.seed for request in requests] == [5, 6, 7]
    assert [request.sampling.seed for request in chat(n=2, seed=5).requests] == [5, 6]


def test_best_of_makes_more_than_are_shown() -> None:
    call = completion_call(n=2, best_of=3, prompt=["a", "b"], temperature=0)
    assert (len(call.requests), call.num_samples, call.num_best) == (6, 3, 2)
    assert completion_call(n=2, best_of=2).num_best is None
    assert completion_call(n=2, best_of=2, stream=True).show.stream
    with pytest.raises(InvalidParameter, match="`best_of` is 1, but `n` is 2"):
        completion(n=2, best_of=1)
    with pytest.raises(InvalidParameter, match=r"`best_of` is 3.*streaming"):
        completion(n=2, best_of=3, stream=True)
    with pytest.raises(InvalidParameter, match=r"`best_of` is 5.*makes 10 answers.*at most 8"):
        completion(prompt=["a", "b"], best_of=5)


def test_echo_asks_for_the_prompts_log_probabilities() -> None:
    assert completion(echo=True, logprobs=2).prompt_logprobs
    assert completion(echo=True, logprobs=2).num_top_logprobs == 2
    assert not completion(echo=True).prompt_logprobs
    assert not completion(logprobs=2).prompt_logprobs
    with pytest.raises(InvalidParameter, match="`echo` with `logprobs`"):
        completion(echo=True, logprobs=0, stream=True)


def test_top_logprobs_need_logprobs() -> None:
    assert chat(logprobs=True, top_logprobs=20).requests[0].num_top_logprobs == 20
    with pytest.raises(InvalidParameter, match="`top_logprobs` needs `logprobs`"):
        chat(top_logprobs=1)


def test_the_templates_options_are_read() -> None:
    options = chat(
        continue_final_message=True,
        chat_template_kwargs={"enable_thinking": False},
        documents=[{"title": "t", "text": "x"}],
    ).chat
    assert options.continue_final_message and not options.add_generation_prompt
    assert options.variables == {"enable_thinking": False}
    assert options.documents == ({"title": "t", "text": "x"},)
    assert not chat(add_generation_prompt=False).chat.add_generation_prompt
    with pytest.raises(InvalidParameter, match="excludes `add_generation_prompt`"):
        chat(continue_final_message=True, add_generation_prompt=True)


def test_messages_keep_roles_and_join_text_parts() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    call = chat(
        messages=[
            {"role": "developer", "content": "d"},
            {"role": "user", "content": parts, "name": "ann"},
            {"role": "assistant", "content": "c", "refusal": None, "audio": None},
        ]
    )
    assert call.messages is not None
    assert [message.to_template() for message in call.messages] == [
        {"role": "system", "content": "d"},
        {"role": "user", "content": "ab", "name": "ann"},
        {"role": "assistant", "content": "c"},
    ]


@pytest.mark.parametrize("name", ["", "base", "__base_model__", "tiny/base"])
def test_the_base_models_names(name: str) -> None:
    call = parse_completion({"model": name, "prompt": "a"}, LIMITS)
    assert (call.requests[0].adapter_id, call.model) == (None, "tiny/base")


def test_a_model_must_be_named() -> None:
    with pytest.raises(InvalidParameter, match="`model` must be a string"):
        parse_completion({"prompt": "a"}, LIMITS)
    with pytest.raises(InvalidParameter, match="`model` must be a string, not an integer"):
        completion(model=3)
    call = completion_call(model="org/x", adapter_source="LOCAL")
    assert (call.requests[0].adapter_id, call.requests[0].adapter_source) == ("org/x", "local")
    assert call.model == "org/x"
