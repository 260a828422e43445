"""What ``litellm`` makes of a server by each of its providers (``contract_cases``)."""

from __future__ import annotations

import asyncio
import json
from typing import Any, Literal

import litellm
from pydantic import BaseModel, ConfigDict

from tests.servers.contract_cases import ADAPTER, BASE, PROMPT, VERDICT, main, raised

CHATS = ("openai", "hosted_vllm", "huggingface")
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"day": {"enum": ["today", "tomorrow"]}},
            "required": ["day"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}


class Verdict(BaseModel):
    model_config = ConfigDict(extra="forbid")
    word: Literal["good", "bad"]
    sure: bool


def arguments(url: str, provider: str, model: str = ADAPTER, **options: Any) -> dict[str, Any]:
    base = url if provider == "huggingface" else url + "/v1"
    shared: dict[str, Any] = {"temperature": 0, "max_tokens": 6, "max_retries": 0, "timeout": 60}
    return {"model": f"{provider}/{model}", "api_base": base, "api_key": "none"} | shared | options


def said(text: str = PROMPT) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def text_of(stream: Any) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)


def chats(url: str) -> Any:
    """By provider: whole, streamed, awaited."""
    return {provider: _chat(arguments(url, provider)) for provider in CHATS}


def _chat(asked: dict[str, Any]) -> Any:
    whole = litellm.completion(messages=said(), **asked)
    awaited = asyncio.run(litellm.acompletion(messages=said(), **asked))
    return {
        "content": whole.choices[0].message.content,
        "finish_reason": whole.choices[0].finish_reason,
        "usage": [whole.usage.prompt_tokens, whole.usage.completion_tokens],
        "streamed": text_of(litellm.completion(messages=said(), stream=True, **asked)),
        "awaited": awaited.choices[0].message.content,
    }


def base(url: str) -> Any:
    answer = litellm.completion(messages=said(), **arguments(url, "openai", BASE))
    return answer.choices[0].message.content


def streamed_usage(url: str) -> Any:
    options = {"include_usage": True}
    asked = arguments(url, "hosted_vllm", stream=True, stream_options=options)
    return list(litellm.completion(messages=said(), **asked))[-1].usage.completion_tokens


def batch(url: str) -> Any:
    asked = arguments(url, "openai")
    answers = litellm.batch_completion(messages=[said(), said("The ship")], **asked)
    return [answer.choices[0].message.content for answer in answers]


def samples(url: str) -> Any:
    asked = arguments(url, "openai", n=2, temperature=1, seed=3, logprobs=True, top_logprobs=2)
    answer = litellm.completion(messages=said(), **asked)
    return [[c.message.content, len(c.logprobs.content)] for c in answer.choices]


def structured(url: str) -> Any:
    asked = {p: arguments(url, p, max_tokens=200, response_format=Verdict) for p in CHATS}
    answers = {p: litellm.completion(messages=said(VERDICT), **a) for p, a in asked.items()}
    return {p: json.loads(a.choices[0].message.content) for p, a in answers.items()}


def tool(url: str) -> Any:
    asked = arguments(url, "openai", max_tokens=200)  # hosted_vllm drops what makes it strict
    choice = {"type": "function", "function": {"name": "weather"}}
    answer = litellm.completion(
        messages=said("Rain?"), tools=[WEATHER], tool_choice=choice, **asked
    )
    (call,) = answer.choices[0].message.tool_calls
    return {"name": call.function.name, "arguments": json.loads(call.function.arguments)}


def vllm_fields(url: str) -> Any:
    """What only vLLM's servers and this one know goes into the body as it is."""
    extra = {"top_k": 1, "guided_regex": "[ab]{3}", "ignore_eos": False}
    asked = arguments(url, "hosted_vllm", temperature=1, extra_body=extra)
    return litellm.completion(messages=said(), **asked).choices[0].message.content


def text_completions(url: str) -> Any:
    """The provider for /v1/completions, called as a chat and as a completion."""
    asked = arguments(url, "text-completion-openai")
    whole = litellm.text_completion(prompt=PROMPT, **asked)
    stream = litellm.text_completion(prompt=PROMPT, stream=True, **asked)
    several = litellm.text_completion(prompt=[PROMPT, "The ship"], **asked)
    return {
        "whole": whole.choices[0].text,
        "streamed": "".join(chunk.choices[0].text or "" for chunk in stream),
        "several": [choice.text for choice in several.choices],
        "as a chat": litellm.completion(messages=said(), **asked).choices[0].message.content,
    }


def embeddings(url: str) -> Any:
    asked = {"api_base": url + "/v1", "api_key": "none", "input": ["a", "b"]}
    providers = ("openai", "hosted_vllm")
    made = {p: litellm.embedding(model=f"{p}/{ADAPTER}", **asked) for p in providers}
    return {p: [len(item["embedding"]) for item in answer.data] for p, answer in made.items()}


def unknown_model(url: str) -> Any:
    return {provider: _refused(arguments(url, provider, "nobody")) for provider in CHATS}


def too_long(url: str) -> Any:
    return _refused(arguments(url, "openai", max_tokens=100_000))


def _refused(asked: dict[str, Any]) -> str:
    return raised(lambda: litellm.completion(messages=said(), **asked))


if __name__ == "__main__":
    main(
        *(chats, base, streamed_usage, batch, samples, structured, tool, vllm_fields),
        *(text_completions, embeddings, unknown_model, too_long),
    )
