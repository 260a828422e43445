"""A GGUF's vocabulary as the files tokenizer.json and tokenizer_config.json.

llama.cpp's src/llama-vocab.cpp is the source of the regular expressions and of the defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from jlorax.errors import ModelInvalid

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")
_DIGITS = (r"\p{N}", _GPT2)

# name in `tokenizer.ggml.pre` -> the cuts made one after the other
_CUTS: dict[str, tuple[str, ...]] = {
    "default": _DEFAULT,
    "gpt-2": (_GPT2,),
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "llama-bpe": (_LLAMA3,),
    "llama3": (_LLAMA3,),
    "llama-v3": (_LLAMA3,),
    "tekken": (_TEKKEN,),
}
_LLAMA3_LIKE = frozenset({"llama-bpe", "llama3", "llama-v3", "tekken"})

Metadata = Mapping[str, Any]


class TokenType(IntEnum):
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def build_tokenizer(metadata: Metadata, file: str) -> Tokenizer:
    """The fast tokenizer that the metadata describes; raises ModelInvalid, which names the key."""
    tokens, types = _vocabulary(metadata, file)
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        tokenizer = _byte_level(metadata, tokens, file)
    elif kind == "llama":
        tokenizer = _sentencepiece(metadata, tokens, types, file)
    else:
        raise ModelInvalid(
            f"{file}: tokenizer.ggml.model is {kind!r}; known are 'gpt2' and 'llama'"
        )
    _add_tokens(tokenizer, tokens, types)
    _add_ends(tokenizer, metadata, tokens, file)
    if tokenizer.get_vocab_size(with_added_tokens=True) != len(tokens):
        raise ModelInvalid(f"{file}: tokenizer.ggml.tokens repeats some of its {len(tokens)} words")
    return tokenizer


def tokenizer_config(metadata: Metadata, file: str) -> dict[str, Any]:
    """What transformers reads beside tokenizer.json."""
    tokens = metadata["tokenizer.ggml.tokens"]
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token_id = special_id(metadata, key, file)
        if token_id is not None:
            config[f"{role}_token"] = tokens[token_id]
    template = metadata.get("tokenizer.chat_template")
    if template is not None:
        config["chat_template"] = template
    return config


def special_id(metadata: Metadata, role: str, file: str) -> int | None:
    """``role``: bos, eos, eot, unknown or padding."""
    key = f"tokenizer.ggml.{role}_token_id"
    token_id = metadata.get(key)
    if token_id is None:
        return None
    num_tokens = len(metadata["tokenizer.ggml.tokens"])
    if not 0 <= token_id < num_tokens:
        raise ModelInvalid(f"{file}: {key} is {token_id}, but there are {num_tokens} tokens")
    return int(token_id)


def _vocabulary(metadata: Metadata, file: str) -> tuple[list[str], list[TokenType]]:
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not tokens:
        raise ModelInvalid(f"{file}: tokenizer.ggml.tokens is missing")
    raw_types = metadata.get("tokenizer.ggml.token_type") or [TokenType.NORMAL] * len(tokens)
    if len(raw_types) != len(tokens):
        raise ModelInvalid(
            f"{file}: tokenizer.ggml.token_type has {len(raw_types)} entries "
            f"for {len(tokens)} tokens"
        )
    try:
        return tokens, [TokenType(value) for value in raw_types]
    except ValueError as error:
        raise ModelInvalid(f"{file}: tokenizer.ggml.token_type: {error}") from None


def _byte_level(metadata: Metadata, tokens: list[str], file: str) -> Tokenizer:
    pre = metadata.get("tokenizer.ggml.pre", "default")
    if pre not in _CUTS:
        raise ModelInvalid(
            f"{file}: tokenizer.ggml.pre is {pre!r}; known are {', '.join(sorted(_CUTS))}"
        )
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=_listed_merges(metadata, frozenset(tokens), file),
            ignore_merges=pre in _LLAMA3_LIKE,
        )
    )
    cuts: list[pre_tokenizers.PreTokenizer] = [
        pre_tokenizers.Split(Regex(cut), behavior="isolated") for cut in _CUTS[pre]
    ]
    cuts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _listed_merges(metadata: Metadata, known: frozenset[str], file: str) -> list[tuple[str, str]]:
    merges = []
    for line in metadata.get("tokenizer.ggml.merges", ()):
        left, _, right = line.partition(" ")
        if left not in known or right not in known or left + right not in known:
            raise ModelInvalid(f"{file}: tokenizer.ggml.merges: {line!r} joins no known tokens")
        merges.append((left, right))
    if not merges:
        raise ModelInvalid(f"{file}: tokenizer.ggml.merges is missing")
    return merges


def _sentencepiece(
    metadata: Metadata, tokens: list[str], types: list[TokenType], file: str
) -> Tokenizer:
    if metadata.get("tokenizer.ggml.precompiled_charsmap"):
        raise ModelInvalid(f"{file}: tokenizer.ggml.precompiled_charsmap is not supported")
    if metadata.get("tokenizer.ggml.remove_extra_whitespaces"):
        raise ModelInvalid(f"{file}: tokenizer.ggml.remove_extra_whitespaces is not supported")
    unknown = [
        token for token, kind in zip(tokens, types, strict=True) if kind is TokenType.UNKNOWN
    ]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=_scored_merges(metadata, tokens, types, file),
            unk_token=unknown[0] if unknown else None,
            fuse_unk=True,
            byte_fallback=types.count(TokenType.BYTE) == 256,
        )
    )
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    space = [normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), *space] if prefix else space
    )
    back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(
        [*back, decoders.Strip(content=" ", left=1, right=0)] if prefix else back
    )
    return tokenizer


def _scored_merges(
    metadata: Metadata, tokens: list[str], types: list[TokenType], file: str
) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third, best score first, as SentencePiece joins them.

    Control tokens take no part: or plain text that reads "<s>" would merge into the token.
    """
    scores = metadata.get("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(tokens):
        raise ModelInvalid(
            f"{file}: tokenizer.ggml.scores has {len(scores or ())} entries "
            f"for {len(tokens)} tokens"
        )
    score_of = {
        token: score
        for token, score, kind in zip(tokens, scores, types, strict=True)
        if kind is TokenType.NORMAL
    }
    joins = [
        (-score, -cut, token)
        for token, score in score_of.items()
        for cut in range(1, len(token))
        if token[:cut] in score_of and token[cut:] in score_of
    ]
    joins.sort()
    return [(token[:-minus_cut], token[-minus_cut:]) for _, minus_cut, token in joins]


def _add_tokens(tokenizer: Tokenizer, tokens: list[str], types: list[TokenType]) -> None:
    special, plain = [], []
    for token, kind in zip(tokens, types, strict=True):
        if kind in (TokenType.CONTROL, TokenType.UNKNOWN):
            special.append(AddedToken(token, special=True, normalized=False))
        elif kind is TokenType.USER_DEFINED:
            plain.append(AddedToken(token, special=False, normalized=False))
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(plain)


def _add_ends(tokenizer: Tokenizer, metadata: Metadata, tokens: list[str], file: str) -> None:
    """bos before and eos after every text, where the metadata (or llama.cpp by default) says so."""
    begins = (
        metadata.get("tokenizer.ggml.model") == "llama"
        or metadata.get("tokenizer.ggml.pre") in _LLAMA3_LIKE
    )
    ends = {
        "bos": metadata.get("tokenizer.ggml.add_bos_token", begins),
        "eos": metadata.get("tokenizer.ggml.add_eos_token", False),
    }
    used: dict[str, int] = {}
    template = []
    for role in ("bos", "text", "eos"):
        if role == "text":
            template.append("$A")
        elif ends[role]:
            token_id = special_id(metadata, role, file)
            if token_id is None:
                raise ModelInvalid(f"{file}: tokenizer.ggml.{role}_token_id is missing")
            used[tokens[token_id]] = token_id
            template.append(tokens[token_id])
    if used:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, pair=[*template, "$B:1"], special_tokens=list(used.items())
        )
