"""/tokenize, as LoRAX's clients ask (``inputs``) and as vLLM's do (``prompt`` or ``messages``), and
vLLM's /detokenize."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from jlorax.wire.call import Call
from jlorax.wire.native import parse_tokenize
from jlorax.wire.strict_json import dumps
from jlorax.wire.tokens import (
    is_vllm_tokenize,
    parse_detokenize,
    parse_tokenize_call,
    render_tokens,
)
from servers.serving import (
    ENGINE,
    encoded,
    json_response,
    limits_of,
    off_loop,
    read_call,
    tokenized,
)


def routes() -> list[web.RouteDef]:
    return [web.post("/tokenize", tokenize), web.post("/detokenize", detokenize)]


async def tokenize(request: web.Request) -> web.Response:
    asked = await read_call(request, _parsed)
    what, flag = asked
    if isinstance(what, str):
        return await _pieces(request, what, special=flag)
    return await _ids(request, what, wants_texts=flag)


def _parsed(body: dict[str, Any]) -> tuple[Call, bool] | tuple[str, bool]:
    return parse_tokenize_call(body) if is_vllm_tokenize(body) else parse_tokenize(body)


async def _pieces(request: web.Request, text: str, special: bool) -> web.Response:
    """LoRAX's list, with the place of each token in the text."""
    tokenizer = request.app[ENGINE].tokenizer

    def listed() -> str:
        return dumps(
            [
                {"id": id_, "text": piece, "start": start, "stop": stop}
                for id_, piece, start, stop in tokenizer.tokenize_with_offsets(text, special)
            ]
        )

    shown = await off_loop(len(text), listed)
    return web.Response(text=shown, content_type="application/json")


async def _ids(request: web.Request, call: Call, wants_texts: bool) -> web.Response:
    engine = request.app[ENGINE]
    (prompt,) = (await tokenized(engine, call)).requests
    ids = await encoded(engine.tokenizer, prompt)
    texts = None
    if wants_texts:
        texts = await off_loop(len(ids), lambda: [engine.tokenizer.token_text(i) for i in ids])
    return json_response(render_tokens(ids, engine.model_info.max_seq_len, texts))


async def detokenize(request: web.Request) -> web.Response:
    limits = limits_of(request.app)
    ids = await read_call(request, lambda body: parse_detokenize(body, limits))
    tokenizer = request.app[ENGINE].tokenizer
    text = await off_loop(len(ids), lambda: tokenizer.decode(ids, skip_special_tokens=False))
    return json_response({"prompt": text})
