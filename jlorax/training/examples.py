"""Rows of data as examples: token ids, and which of them are to be learnt. Plain.

prompt, completion   the completion and its end are learnt
messages             every turn of the assistant and its end
text                 all of it
template             a prompt made of the row's columns, then as prompt and completion
alpaca               a prompt made of instruction and input, then as prompt and output
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import numpy as np

from jlorax.errors import ConfigError, DataInvalid, InvalidRequest
from jlorax.training.config import DataConfig, Mode, template_parts
from jlorax.training.records import Digest, Row, read_rows

Message = Mapping[str, Any]
MakeExample = Callable[[Row, int], "Example | None"]
INSTRUCTION, INPUT, OUTPUT = "instruction", "input", "output"

# Stanford Alpaca's (Taori et al. 2023) as axolotl writes them
_ALPACA = """\
Below is an instruction that describes a task. Write a response that appropriately completes the \
request.

### Instruction:
{}

### Response:
"""
_ALPACA_WITH_INPUT = """\
Below is an instruction that describes a task, paired with an input that provides further context. \
Write a response that appropriately completes the request.

### Instruction:
{}

### Input:
{}

### Response:
"""


class ExampleTokenizer(Protocol):
    """What making examples needs of ``jlorax.tokenizer.Tokenizer``."""

    eos_token_ids: tuple[int, ...]
    chat_template: str | dict[str, str] | None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...
    def encode_chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]: ...


@dataclass(frozen=True)
class Example:
    """``is_target``: tokens that are to be predicted from those before them. ``number``: the
    data's row, from 1."""

    ids: np.ndarray  # i32[n]
    is_target: np.ndarray  # bool[n]
    number: int

    @property
    def num_targets(self) -> int:
        """The first token follows nothing."""
        return int(self.is_target[1:].sum())

    def next_targets(self) -> np.ndarray:
        """i32[n]: the token that follows each, -1 where it is not to be learnt."""
        following = np.where(self.is_target[1:], self.ids[1:], -1)
        return np.append(following, -1).astype(np.int32)


@dataclass(frozen=True)
class DataReport:
    """What became of the data: nothing is left out or cut in silence."""

    num_rows: int = 0
    num_used: int = 0
    num_validation: int = 0
    num_empty: int = 0
    num_truncated: int = 0
    num_dropped: int = 0  # too long, or nothing to learn was left
    num_tokens: int = 0
    num_target_tokens: int = 0
    longest: int = 0
    digest: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Data:
    train: list[Example]
    validation: list[Example]
    report: DataReport


def load_data(config: DataConfig, tokenizer: ExampleTokenizer, seed: int) -> Data:
    """Reads the files. DataInvalid names the row, ConfigError what no row is to blame for."""
    examples, report = _read(config, config.dataset, tokenizer)
    if not examples:
        raise ConfigError(f"dataset {config.dataset!r} has no examples: {_counts(report)}")
    if config.validation is not None:
        validation, _ = _read(config, config.validation, tokenizer)
        if not validation:
            raise ConfigError(f"validation {config.validation!r} has no examples")
    else:
        examples, validation = _split(examples, config.validation_fraction, seed)
    return Data(examples, validation, replace(report, num_validation=len(validation)))


def _counts(report: DataReport) -> str:
    return (
        f"{report.num_rows} rows, {report.num_empty} of them empty, {report.num_dropped} too long "
        "or with nothing to learn"
    )


def _split(
    examples: list[Example], fraction: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """(to learn from, to validate with): at least one each where there are two."""
    num = min(len(examples) - 1, max(1, round(fraction * len(examples)))) if fraction > 0 else 0
    chosen = set(np.random.default_rng(seed).permutation(len(examples))[:num].tolist())
    kept = [example for i, example in enumerate(examples) if i not in chosen]
    return kept, [example for i, example in enumerate(examples) if i in chosen]


def _read(
    config: DataConfig, path: str, tokenizer: ExampleTokenizer
) -> tuple[list[Example], DataReport]:
    digest, maker = Digest(), _Maker(config, tokenizer)
    examples: list[Example] = []
    num_rows = num_empty = num_truncated = num_dropped = 0
    for number, row in digest.seen(read_rows(path, config.root)):
        num_rows += 1
        example = maker.example(row, number)
        if example is None:
            num_empty += 1
            continue
        fitted = _fitted(example, config)
        if fitted is None or fitted.num_targets == 0:
            num_dropped += 1
            continue
        num_truncated += len(fitted.ids) < len(example.ids)
        examples.append(fitted)
    report = DataReport(
        num_rows=num_rows,
        num_used=len(examples),
        num_empty=num_empty,
        num_truncated=num_truncated,
        num_dropped=num_dropped,
        num_tokens=sum(len(example.ids) for example in examples),
        num_target_tokens=sum(example.num_targets for example in examples),
        longest=max((len(example.ids) for example in examples), default=0),
        digest=digest.hex(),
    )
    return examples, report


def _fitted(example: Example, config: DataConfig) -> Example | None:
    """Cut at its end, so that what is learnt still follows what it followed; or None."""
    num, most = len(example.ids), config.max_seq_len
    if num <= most:
        return example
    if config.on_long == "error":
        raise DataInvalid(example.number, f"has {num} tokens; max_seq_len is {most}")
    if config.on_long == "drop":
        return None
    return replace(example, ids=example.ids[:most], is_target=example.is_target[:most])


class _Maker:
    """Rows to examples, all in the way that the first row decides."""

    def __init__(self, config: DataConfig, tokenizer: ExampleTokenizer) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._make: MakeExample | None = None

    def example(self, row: Row, number: int) -> Example | None:
        """None: the row says nothing. Texts that cannot be tokenized are the row's fault."""
        if self._make is None:
            self._make = self._way(row, number)
        try:
            return self._make(row, number)
        except InvalidRequest as error:
            raise DataInvalid(number, f"cannot be made tokens: {error}") from None

    def _way(self, row: Row, number: int) -> MakeExample:
        mode = self._mode(row, number)
        if mode == "text":
            self._refuse_system("a text is no chat")
            return self._text
        if mode == "chat":
            return lambda row, number: self._chat(self._messages(row, number), number)
        wraps = self._wraps()
        make = self._turn if wraps else self._completion
        prompt = self._prompt
        column = self._config.completion_column
        if mode == "template":
            prompt = self._templated
        elif mode == "alpaca":
            prompt = self._instruction if wraps else self._alpaca
            column = OUTPUT

        def example(row: Row, number: int) -> Example | None:
            return make(prompt(row, number), self._column(row, column, number), number)

        return example

    def _wraps(self) -> bool:
        """Whether a prompt and its completion are made a chat of one turn."""
        wanted, has_template = self._config.use_chat_template, self._tokenizer.chat_template
        if wanted and has_template is None:
            raise ConfigError("use_chat_template is true, but the base model has no chat template")
        wraps = has_template is not None if wanted is None else wanted
        if not wraps:
            self._refuse_system("prompts are not made a chat here")
        return wraps

    def _refuse_system(self, reason: str) -> None:
        if self._config.system is not None:
            raise ConfigError(f"system is {self._config.system!r}, but {reason}")

    def _mode(self, row: Row, number: int) -> Mode:
        config = self._config
        if config.mode != "auto":
            return config.mode
        if config.template is not None:
            return "template"
        if config.messages_column in row:
            return "chat"
        if config.prompt_column in row and config.completion_column in row:
            return "completion"
        if config.text_column in row:
            return "text"
        if INSTRUCTION in row and OUTPUT in row:
            return "alpaca"
        raise DataInvalid(
            number,
            f"has the columns {_named(row)}; needed are {config.messages_column!r}, or "
            f"{config.prompt_column!r} and {config.completion_column!r}, or "
            f"{config.text_column!r}, or {INSTRUCTION!r} and {OUTPUT!r}, or a template",
        )

    # ---- columns

    def _column(self, row: Row, name: str, number: int) -> str:
        if name not in row:
            raise DataInvalid(number, f"lacks the column {name!r}; it has {_named(row)}")
        value = row[name]
        if isinstance(value, Mapping | list):
            raise DataInvalid(number, f"has {type(value).__name__} in {name!r}: a text is needed")
        is_missing = value is None or value != value  # a DataFrame writes NaN for nothing
        return "" if is_missing else str(value)

    def _prompt(self, row: Row, number: int) -> str:
        return self._column(row, self._config.prompt_column, number)

    def _templated(self, row: Row, number: int) -> str:
        assert self._config.template is not None
        return "".join(
            text if column is None else text + self._column(row, column, number)
            for text, column in template_parts(self._config.template)
        )

    def _alpaca(self, row: Row, number: int) -> str:
        instruction, given = self._instruction_parts(row, number)
        if not given.strip():
            return _ALPACA.format(instruction)
        return _ALPACA_WITH_INPUT.format(instruction, given)

    def _instruction(self, row: Row, number: int) -> str:
        """As a user would say it in a chat."""
        instruction, given = self._instruction_parts(row, number)
        return f"{instruction}\n\n{given}" if given.strip() else instruction

    def _instruction_parts(self, row: Row, number: int) -> tuple[str, str]:
        given = self._column(row, INPUT, number) if INPUT in row else ""
        return self._column(row, INSTRUCTION, number), given

    def _messages(self, row: Row, number: int) -> list[Message]:
        column = self._config.messages_column
        if column not in row:
            raise DataInvalid(number, f"lacks the column {column!r}; it has {_named(row)}")
        messages = row[column]
        if not isinstance(messages, Sequence) or not all(_is_message(m) for m in messages):
            raise DataInvalid(number, f"has {column!r} that are no list of role and content")
        return list(messages)

    # ---- examples

    def _text(self, row: Row, number: int) -> Example | None:
        text = self._column(row, self._config.text_column, number)
        if not text.strip():
            return None
        ids = [*self._tokenizer.encode(text), *self._end()]
        return _example(ids, [range(len(ids))], number)

    def _completion(self, prompt: str, completion: str, number: int) -> Example | None:
        if not completion.strip():
            return None
        begin = self._tokenizer.encode(prompt)
        ids = [*begin, *self._tokenizer.encode(completion, add_special_tokens=False), *self._end()]
        first = 0 if self._config.train_on_prompt else len(begin)
        return _example(ids, [range(first, len(ids))], number)

    def _turn(self, prompt: str, completion: str, number: int) -> Example | None:
        """Prompt and completion as a chat of one turn."""
        said = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        return self._chat(said, number)

    def _chat(self, messages: Sequence[Message], number: int) -> Example | None:
        """``system`` stands before a chat that has none of its own."""
        system = self._config.system
        if system is not None and (not messages or messages[0]["role"] != "system"):
            messages = [{"role": "system", "content": system}, *messages]
        if not any(m["role"] == "assistant" and _said(m) for m in messages):
            return None
        whole = self._tokenizer.encode_chat(messages, add_generation_prompt=False)
        if self._config.train_on_prompt:
            return _example(whole, [range(len(whole))], number)
        answers = [
            self._answer(whole, messages, place, number)
            for place, message in enumerate(messages)
            if message["role"] == "assistant"
        ]
        return _example(whole, answers, number)

    def _answer(
        self, whole: list[int], messages: Sequence[Message], place: int, number: int
    ) -> range:
        """Where one answer stands in the chat: what the template writes for it, to its end token.

        Found by rendering the chat as it was when the answer was due, which a template must not
        write otherwise later.
        """
        before = self._tokenizer.encode_chat(messages[:place], add_generation_prompt=True)
        after = self._tokenizer.encode_chat(messages[: place + 1], add_generation_prompt=False)
        if whole[: len(before)] != before or whole[: len(after)] != after:
            raise DataInvalid(
                number,
                f"has an answer (message {place + 1}) that the chat template writes otherwise when "
                "more follows: what is to be learnt cannot be told. One turn a row works",
            )
        stops = set(self._tokenizer.eos_token_ids)
        end = next((i + 1 for i in range(len(before), len(after)) if whole[i] in stops), len(after))
        return range(len(before), end)

    def _end(self) -> list[int]:
        """A model ends its answer with the first of the tokens that end one."""
        return list(self._tokenizer.eos_token_ids[:1])


def _example(ids: list[int], targets: Iterable[range], number: int) -> Example:
    is_target = np.zeros(len(ids), bool)
    for part in targets:
        is_target[part.start : part.stop] = True
    return Example(np.asarray(ids, np.int32), is_target, number)


def _is_message(message: Any) -> bool:
    return isinstance(message, Mapping) and isinstance(message.get("role"), str)


def _said(message: Message) -> bool:
    content = message.get("content")
    return bool(message.get("tool_calls")) or (isinstance(content, str) and bool(content.strip()))


def _named(row: Row) -> str:
    names = ", ".join(repr(name) for name in list(row)[:12])
    return names + (", ..." if len(row) > 12 else "")
