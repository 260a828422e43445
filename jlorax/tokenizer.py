"""Text to token ids and back: whole prompts, chats, and one generated token at a time."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from jlorax.errors import InvalidParameter, InvalidRequest, ModelInvalid
from jlorax.hugging_face import import_transformers

Messages = Sequence[Mapping[str, Any]]

_BROKEN = "\ufffd"  # what decoding makes of bytes that are no character, or not yet one
_CONTEXT_TOKENS = 6  # of the prompt: enough for the first piece to know whether a space precedes
_MAX_CHARACTER_TOKENS = 4  # one for each of its bytes
_SHORT_CHARACTERS = 4096  # tokenized where they are: a thread would take longer to begin
_MAX_HELD_TOKENS = 16  # that many without a whole character can only be broken bytes


class TokenPiece(NamedTuple):
    """One token of a text; ``start`` and ``stop`` count characters of that text."""

    id: int
    text: str
    start: int
    stop: int


class Tokenizer:
    """A Hugging Face tokenizer of the fast kind; safe to use from several threads."""

    def __init__(self, hf_tokenizer: Any, eos_token_ids: Iterable[int] = ()) -> None:
        self._hf = hf_tokenizer
        self.backend: tokenizers.Tokenizer = hf_tokenizer.backend_tokenizer
        self.backend.no_truncation()
        self.backend.no_padding()
        # A copy that takes "<|im_end|>" for ten characters; a flag on the one tokenizer would be
        # seen by every thread.
        self._plain = tokenizers.Tokenizer.from_str(self.backend.to_str())
        self._plain.encode_special_tokens = True
        added = self.backend.get_added_tokens_decoder()
        special = {i: token.content for i, token in added.items() if token.special}
        special |= zip(hf_tokenizer.all_special_ids, hf_tokenizer.all_special_tokens, strict=True)
        self._special = frozenset(special)
        self._special_ids = {token: i for i, token in special.items()}
        self._disguise = _Disguise(special.values())
        own_eos = () if hf_tokenizer.eos_token_id is None else (hf_tokenizer.eos_token_id,)
        self.eos_token_ids: tuple[int, ...] = tuple(sorted({*eos_token_ids, *own_eos}))
        self.bos_token_id: int | None = hf_tokenizer.bos_token_id
        self.vocab_size: int = len(hf_tokenizer)
        self.chat_template: str | dict[str, str] | None = hf_tokenizer.chat_template
        self._reserved = frozenset(  # what no variable of a template may be named
            {*signature(hf_tokenizer.apply_chat_template).parameters, "messages"}
            | hf_tokenizer.special_tokens_map.keys()
        )
        self._anchor = self.backend.encode("a", add_special_tokens=False).ids[-1:]
        self._anchor_text = self.decode(self._anchor)
        self._alone: dict[int, str] = {}  # what decode([id]) gave

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """From a model's folder, without the network and without running code from it."""
        auto_tokenizer = import_transformers("AutoTokenizer")
        try:
            hf = auto_tokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # its files are a user's, and it raises anything
            raise ModelInvalid(f"{folder}: the tokenizer cannot be loaded: {error}") from error
        if not hasattr(hf, "backend_tokenizer"):
            raise ModelInvalid(f"{folder}: there is no tokenizer.json (a fast tokenizer is needed)")
        return cls(hf, _declared_eos(folder))

    @classmethod
    def numbered(cls, vocab_size: int) -> Tokenizer:
        """For a model that has none: token i is the word "i", and no token ends an answer."""
        words = {str(i): i for i in range(vocab_size)}
        backend = tokenizers.Tokenizer(WordLevel(words, unk_token="0"))
        backend.pre_tokenizer = WhitespaceSplit()
        fast_tokenizer = import_transformers("PreTrainedTokenizerFast")
        return cls(fast_tokenizer(tokenizer_object=backend))

    def with_template(self, template: str) -> Tokenizer:
        """The same tokens under another chat template."""
        other = copy(self)
        other.chat_template = template
        return other

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Special tokens spelled out in ``text`` are taken as such, as everywhere in this field."""
        return self._encode(self.backend, text, add_special_tokens).ids

    def encode_chat(
        self,
        messages: Messages,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        *,
        continue_final_message: bool = False,
        documents: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The ids of the chat template's text, in which only the template writes special tokens.

        "<|im_end|>" inside a message stays plain text: a user cannot speak in another's role.
        Every other chat gets exactly what transformers' apply_chat_template gives. ``variables``
        are the template's own; one that it does not read is refused, as are ``documents``.
        """
        self._check_read(documents, variables or {})
        users: dict[str, Any] = {
            "conversation": list(messages),
            "tools": None if tools is None else list(tools),
            "documents": None if documents is None else list(documents),
            **(variables or {}),
        }
        ours = {
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
        }
        rendered = self._render(users, ours)
        texts = list(users.values())
        if not self._disguise.needed(texts):
            return self.encode(rendered, add_special_tokens=False)
        disguise = self._disguise.unlike(rendered)
        hidden = self._render({name: disguise.hide(text) for name, text in users.items()}, ours)
        if disguise.counts(hidden) == disguise.counts(rendered) and not disguise.spells_special(
            texts
        ):
            return self.encode(rendered, add_special_tokens=False)
        ids: list[int] = []
        for text, token in disguise.split(hidden):
            ids += self._encode(self._plain, disguise.reveal(text), False).ids
            ids += [] if token is None else [self._special_ids[token]]
        return ids

    def render_chat(
        self,
        messages: Messages,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """The chat template's text; encode messages with ``encode_chat``, never by way of this."""
        users = {
            "conversation": list(messages),
            "tools": None if tools is None else list(tools),
        }
        return self._render(users, {"add_generation_prompt": add_generation_prompt})

    def chat_reads(self, name: str) -> bool:
        """Whether the chat template, or one of several, speaks of a variable of this name."""
        template = self.chat_template or ""
        texts = [template] if isinstance(template, str) else template.values()
        return name.isidentifier() and any(re.search(rf"\b{name}\b", text) for text in texts)

    def _check_read(
        self, documents: Sequence[Mapping[str, Any]] | None, variables: Mapping[str, Any]
    ) -> None:
        if self.chat_template is None:
            return
        if documents is not None and not self.chat_reads("documents"):
            raise InvalidParameter("documents", "are not read by this model's chat template")
        for name in variables:
            if name in self._reserved or not self.chat_reads(name):
                raise InvalidParameter(
                    "chat_template_kwargs",
                    f"has {name[:64]!r}, which this model's chat template does not take",
                )

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def decode_alone(self, token_id: int) -> str:
        """``decode([token_id])``, remembered: every generated token asks for the one before it."""
        text = self._alone.get(token_id)
        if text is None:
            text = self._alone[token_id] = self.decode((token_id,))
        return text

    def token_text(self, token_id: int) -> str:
        """As it reads in the middle of a text: with its space, where a decoder strips the first."""
        text = self.decode([*self._anchor, token_id], skip_special_tokens=False)
        return text.removeprefix(self._anchor_text)

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special

    def tokenize_with_offsets(self, text: str, add_special_tokens: bool = True) -> list[TokenPiece]:
        """A token that no character stands for (a begin-of-text) shows its own name."""
        encoding = self._encode(self.backend, text, add_special_tokens)
        return [
            TokenPiece(i, text[start:stop] if stop > start else token, start, stop)
            for i, token, (start, stop) in zip(
                encoding.ids, encoding.tokens, encoding.offsets, strict=True
            )
        ]

    @staticmethod
    def _encode(
        tokenizer: tokenizers.Tokenizer, text: str, add_special_tokens: bool
    ) -> tokenizers.Encoding:
        try:
            if len(text) < _SHORT_CHARACTERS:
                return tokenizer.encode(text, add_special_tokens=add_special_tokens)
            # a batch of one: ``encode`` holds the interpreter lock, for a second at a megabyte
            return tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)[0]
        except (UnicodeEncodeError, TypeError):
            raise InvalidRequest("the text holds half a character (a lone surrogate)") from None

    def _other_template(self) -> str | None:
        """None: transformers' tokenizer has the right one, or chooses among several."""
        own = self.chat_template
        return own if isinstance(own, str) and own != self._hf.chat_template else None

    def _render(self, users: Mapping[str, Any], ours: Mapping[str, bool]) -> str:
        """``users`` holds what users wrote, ``ours`` how the template is to be used."""
        if self.chat_template is None:
            raise InvalidRequest("this model has no chat template: send a prompt instead")
        try:
            rendered: str = self._hf.apply_chat_template(
                **users, **ours, chat_template=self._other_template(), tokenize=False
            )
        except Exception as error:  # the template speaks through jinja's and Python's own errors
            raise InvalidRequest(f"the chat template refuses these messages: {error}") from error
        return rendered


class IncrementalDetokenizer:
    """Generated ids in, final text out.

    A token's text depends on its neighbours: bytes of one character are spread over tokens, and
    SentencePiece drops the space at the start of a text. So each push decodes a small window twice:

        ids      ... | prefix ...... read ...... now |
        text         |<-- emitted -->|<-- emit this ->|      unless it ends within a character

    The method of vLLM's and TGI's detokenizers (prefix_offset, read_offset).
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        tail = [i for i in prompt_ids[-4 * _CONTEXT_TOKENS :] if not tokenizer.is_special(i)]
        self._ids, self._read = self._context(tail)

    def push(self, token_id: int) -> str:
        """The text that became final: "" while a character is incomplete, and for special ids."""
        if self._tokenizer.is_special(token_id):
            return ""
        self._ids.append(token_id)
        text = self._unread()
        held = len(self._ids) - self._read
        if not text or (text.endswith(_BROKEN) and held < _MAX_HELD_TOKENS):
            return ""
        del self._ids[: self._read]
        self._read = len(self._ids)
        return text

    def finish(self) -> str:
        """What was still held: the broken end of a text that stops within a character."""
        text = self._unread()
        self._read = len(self._ids)
        return text

    def _unread(self) -> str:
        decode, ids = self._tokenizer.decode, self._ids
        is_one = self._read == 1
        before = self._tokenizer.decode_alone(ids[0]) if is_one else decode(ids[: self._read])
        return decode(ids)[len(before) :]

    def _context(self, tail: list[int]) -> tuple[list[int], int]:
        """The prompt's last ids, from one border between characters to another, and what follows.

        A prompt may end within a character; the answer then emits it when it is whole. And no
        window may begin within one: SentencePiece gives up a whole run of bytes for one of them.
        """
        for end in range(len(tail), max(-1, len(tail) - _MAX_CHARACTER_TOKENS), -1):
            latest = max(0, end - _CONTEXT_TOKENS)
            for start in range(latest, max(-1, latest - _MAX_CHARACTER_TOKENS), -1):
                text = self._tokenizer.decode(tail[start:end])
                if not text.startswith(_BROKEN) and not text.endswith(_BROKEN):
                    return tail[start:], end - start
        context = tail[-_CONTEXT_TOKENS:]  # a prompt of broken characters
        return context, len(context)


class StopMatcher:
    """Cuts a text, fed in pieces, at the first stop string.

    "First" is by where it ends, as if the text came character by character, so that the pieces'
    borders never matter. A tail that may be the beginning of a stop string is held back.
    """

    def __init__(self, stops: tuple[str, ...], include: bool) -> None:
        if "" in stops:
            raise ValueError("a stop string is empty")
        self._stops = stops
        self._longest = max(map(len, stops), default=0)
        self._include = include
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """The text to emit now; after a match always ""."""
        if not self._stops:
            return text
        if self.matched is not None:
            return ""
        text = self._held + text
        found = [(text.find(stop), stop) for stop in self._stops if stop in text]
        if found:
            start, self.matched = min(found, key=lambda hit: (hit[0] + len(hit[1]), hit[0]))
            self._held = ""
            return text[: start + len(self.matched) if self._include else start]
        keep = self._num_to_hold(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """The tail that turned out to be no stop string."""
        text, self._held = self._held, ""
        return text

    def _num_to_hold(self, text: str) -> int:
        for num in range(min(self._longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-num:]) for stop in self._stops):
                return num
        return 0


class _Disguise:
    """Keeps users' strings from spelling special tokens while a chat template is rendered.

    One character of every special token ("<") is replaced in the users' strings by one that occurs
    nowhere else, so neither a string nor several put together can spell a token, while a
    template's own trimming and splitting still works. Special tokens that remain are the
    template's.
    """

    def __init__(self, special: Iterable[str], first_stand_in: int = 0xF0000) -> None:
        longest_first = sorted({token for token in special if token}, key=len, reverse=True)
        self._tokens = longest_first
        self._special = _any_of(longest_first)
        # a token of letters alone is hidden whole, or every "user" and "system" would be broken
        marks = {next((c for c in token if not c.isalnum()), token) for token in longest_first}
        by_length = sorted(marks, key=lambda mark: (-len(mark), mark))
        self._marks = _any_of(by_length)
        self._stand_ins = {mark: chr(first_stand_in + i) for i, mark in enumerate(by_length)}
        self._originals = {ord(c): mark for mark, c in self._stand_ins.items()}
        self._end = first_stand_in + len(by_length)

    def unlike(self, text: str) -> _Disguise:
        """One whose stand-ins are not in ``text``; the usual ones are in no text of any language
        (a private-use plane), but a user may know that."""
        disguise = self
        while any(c in text for c in disguise._stand_ins.values()):
            disguise = _Disguise(self._tokens, disguise._end)
        return disguise

    def needed(self, *values: Any) -> bool:
        return any(self._marks.search(text) for value in values for text in _strings(value))

    def spells_special(self, *values: Any) -> bool:
        return any(self._special.search(text) for value in values for text in _strings(value))

    def hide(self, value: Any) -> Any:
        return _map_strings(
            value, lambda text: self._marks.sub(lambda hit: self._stand_ins[hit[0]], text)
        )

    def reveal(self, text: str) -> str:
        return text.translate(self._originals)

    def counts(self, text: str) -> Counter[str]:
        return Counter(self._special.findall(text))

    def split(self, text: str) -> list[tuple[str, str | None]]:
        """Pairs of a plain text and the special token after it, None after the last."""
        pairs: list[tuple[str, str | None]] = []
        start = 0
        for hit in self._special.finditer(text):
            pairs.append((text[start : hit.start()], hit[0]))
            start = hit.end()
        return [*pairs, (text[start:], None)]


def _any_of(words: Sequence[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, words)) or r"(?!)")


def _strings(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, Sequence):
        for item in value:
            yield from _strings(item)


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_map_strings(k, change): _map_strings(v, change) for k, v in value.items()}
    if isinstance(value, Sequence):
        return [_map_strings(item, change) for item in value]
    return value


def _declared_eos(folder: Path) -> set[int]:
    """As transformers' generate reads it: generation_config.json first, else config.json."""
    for name in ("generation_config.json", "config.json"):
        try:
            eos = json.loads((folder / name).read_text(encoding="utf-8")).get("eos_token_id")
        except FileNotFoundError:
            continue
        except (ValueError, AttributeError) as error:
            raise ModelInvalid(f"{folder / name}: {error}") from None
        if eos is not None:
            return {eos} if isinstance(eos, int) else set(eos)
    return set()
