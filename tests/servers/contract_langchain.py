"""What ``langchain-openai`` and ``langchain-huggingface`` make of a server (``contract_cases``)."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

from langchain_core.messages import HumanMessage
from langchain_core.tools import tool
from langchain_huggingface import HuggingFaceEndpoint
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic import BaseModel, ConfigDict

from tests.servers.contract_cases import ADAPTER, BASE, PROMPT, VERDICT, main, raised


class Verdict(BaseModel):
    """Whether a review is good."""

    model_config = ConfigDict(extra="forbid")
    word: Literal["good", "bad"]
    sure: bool


@tool
def weather(day: Literal["today", "tomorrow"]) -> str:
    """The weather of a day."""
    return f"rain {day}"


def chat(url: str, model: str = ADAPTER, **options: Any) -> ChatOpenAI:
    shared: dict[str, Any] = {"temperature": 0, "max_retries": 0, "max_tokens": 6} | options
    return ChatOpenAI(base_url=url + "/v1", api_key="none", model=model, **shared)


def invoke(url: str) -> Any:
    message = chat(url).invoke([("system", "Be kind."), ("human", PROMPT)])
    return {
        "content": message.content,
        "usage": message.usage_metadata,
        "finish_reason": message.response_metadata["finish_reason"],
        "model": message.response_metadata["model_name"],
    }


def invoke_the_base(url: str) -> Any:
    return chat(url, model=BASE).invoke(PROMPT).content


def stream(url: str) -> Any:
    chunks = list(chat(url, stream_usage=True).stream(PROMPT))
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    return {"content": whole.content, "usage": whole.usage_metadata}


def batch(url: str) -> Any:
    """Two chats at once, from two threads."""
    return [message.content for message in chat(url).batch([PROMPT, "The ship"])]


def ainvoke(url: str) -> Any:
    return asyncio.run(chat(url).ainvoke(PROMPT)).content


def logprobs(url: str) -> Any:
    message = chat(url, logprobs=True, top_logprobs=2).invoke(PROMPT)
    return message.response_metadata["logprobs"]["content"]


def samples(url: str) -> Any:
    made = chat(url, n=2, temperature=1, seed=3).generate([[HumanMessage(PROMPT)]])
    return [generation.text for generation in made.generations[0]]


def stop(url: str) -> Any:
    """Bound as a runnable's; the answer is held to letters that hold the stop string."""
    held = {"extra_body": {"guided_regex": "ab+c+"}, "max_tokens": 60}
    return chat(url, **held).bind(stop=["bc"]).invoke(PROMPT).content


def structured_by_schema(url: str) -> Any:
    return _structured(url, "json_schema")


def structured_by_function(url: str) -> Any:
    return _structured(url, "function_calling")


def _structured(url: str, method: Any) -> Any:
    asks = chat(url, max_tokens=200).with_structured_output(Verdict, method=method, strict=True)
    return asks.invoke(VERDICT).model_dump()


def tool_and_its_answer(url: str) -> Any:
    asks = chat(url, max_tokens=200).bind_tools([weather], tool_choice="weather", strict=True)
    said: list[Any] = [("human", "Rain?")]
    called = asks.invoke(said)
    (call,) = called.tool_calls
    later = chat(url).invoke([*said, called, weather.invoke(call)])
    return {"name": call["name"], "args": call["args"], "later": later.content}


def streamed_tool(url: str) -> Any:
    asks = chat(url, max_tokens=200).bind_tools([weather], tool_choice="weather", strict=True)
    chunks = list(asks.stream("Rain?"))
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    return [{"name": call["name"], "args": call["args"]} for call in whole.tool_calls]


def responses(url: str) -> Any:
    """The same class over /v1/responses."""
    return chat(url, use_responses_api=True).invoke(PROMPT).text


def unknown_model(url: str) -> Any:
    return raised(lambda: chat(url, model="nobody").invoke(PROMPT))


def too_long(url: str) -> Any:
    return raised(lambda: chat(url, max_tokens=100_000).invoke(PROMPT))


def completions(url: str) -> Any:
    made = OpenAI(base_url=url + "/v1", api_key="none", model=ADAPTER, max_tokens=6, temperature=0)
    return {
        "whole": made.invoke(PROMPT),
        "streamed": "".join(made.stream(PROMPT)),
        "batch": made.batch([PROMPT, "The ship"]),
    }


def embeddings(url: str) -> Any:
    """As for any server but OpenAI's own: texts are sent, not OpenAI's token ids."""
    made = OpenAIEmbeddings(
        base_url=url + "/v1", api_key="none", model=ADAPTER, check_embedding_ctx_length=False
    )
    return [len(vector) for vector in made.embed_documents(["a", "b"])]


def endpoint(url: str, **options: Any) -> HuggingFaceEndpoint:
    greedy: dict[str, Any] = {"temperature": None, "top_p": None, "typical_p": None}
    return HuggingFaceEndpoint(endpoint_url=url, max_new_tokens=6, **greedy | options)


def hugging_face(url: str) -> Any:
    asks = endpoint(url)
    return {
        "base": asks.invoke(PROMPT),
        "adapter": asks.invoke(PROMPT, adapter_id=ADAPTER),
        "bound": asks.bind(adapter_id=ADAPTER).invoke(PROMPT),
        "streamed": "".join(asks.stream(PROMPT, adapter_id=ADAPTER)),
        "async": asyncio.run(asks.ainvoke(PROMPT, adapter_id=ADAPTER)),
        "batch": asks.batch([PROMPT, PROMPT], adapter_id=ADAPTER),
    }


def hugging_face_as_it_comes(url: str) -> Any:
    """With the class's own sampling: temperature, top-p and typical-p."""
    asks = HuggingFaceEndpoint(endpoint_url=url, max_new_tokens=6, seed=7, do_sample=True)
    return [asks.invoke(PROMPT, adapter_id=ADAPTER) for _ in range(2)]


def hugging_face_unknown(url: str) -> Any:
    """The client has no class of its own for it, but passes on what the server says."""
    try:
        endpoint(url).invoke(PROMPT, adapter_id="nobody")
    except Exception as error:
        return str(error)


if __name__ == "__main__":
    main(
        *(invoke, invoke_the_base, stream, batch, ainvoke, logprobs, samples, stop),
        *(structured_by_schema, structured_by_function, tool_and_its_answer, streamed_tool),
        *(responses, unknown_model, too_long, completions, embeddings),
        *(hugging_face, hugging_face_as_it_comes, hugging_face_unknown),
    )
