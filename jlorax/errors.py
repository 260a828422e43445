"""Every error a caller can meet, one small tree.

    JLoraxError
    ├── InvalidRequest             the request itself is wrong
    │   ├── InvalidParameter       one field is out of range
    │   ├── PromptTooLong          prompt and answer do not fit the context
    │   ├── InvalidAdapterId       a name that can name nothing
    │   └── GrammarDeadEnd         its grammar lets the answer neither go on nor end
    ├── AdapterNotFound            nobody registered that id
    │   └── AdapterGated           it is at a remote, but not for this server's account
    ├── AdapterInvalid             its files cannot be served
    │   ├── UnsupportedAdapter     they use a feature we refuse by name
    │   └── AdapterChanged         they became others while they were read: ask again
    ├── SourceUnavailable          a remote is down, slow or lying, or the disk is full: try later
    ├── AdapterConflict            it exists already, or is in use
    ├── Overloaded                 a bounded queue is full: come back later
    ├── Unavailable                the engine is starting, draining or dead
    ├── Unauthorized               no key, or one that the server does not know
    ├── Forbidden                  the key may not do that
    ├── RequestCancelled           the caller went away
    ├── ModelInvalid               the base model cannot be loaded
    │   └── UnsupportedModel       its architecture is not one of ours
    ├── NotFound                   no such file or job
    ├── StorageFull                the server's disk has no room for what was sent
    ├── TrainingConflict           this server cannot train that, as it was started or as it is now
    ├── DataInvalid                a row of training data cannot be used
    ├── TrainingFailed             a training in another process ended without an adapter
    ├── TrainingDiverged           its loss or gradients are no numbers any more
    └── ConfigError                a flag, variable or key is wrong

A message always carries the numbers. HTTP statuses are decided in ``servers`` alone.
"""

from __future__ import annotations

from typing import Any


class JLoraxError(Exception):
    """Root of the tree. ``code`` is a stable word for machines."""

    code = "internal"

    def __reduce__(self) -> tuple[Any, ...]:
        """Constructors differ, so that another process rebuilds it from what it holds."""
        return _rebuilt, (type(self), self.args, self.__dict__)


def _rebuilt(kind: type[JLoraxError], args: tuple[Any, ...], fields: dict[str, Any]) -> JLoraxError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(fields)
    return error


class InvalidRequest(JLoraxError):
    code = "invalid_request"


class InvalidParameter(InvalidRequest):
    """One named field has a value that is not allowed."""

    code = "invalid_parameter"

    def __init__(self, name: str, message: str) -> None:
        super().__init__(f"`{name}` {message}")
        self.name = name


class PromptTooLong(InvalidRequest):
    code = "prompt_too_long"

    def __init__(self, num_tokens: int, max_new_tokens: int, max_tokens: int) -> None:
        super().__init__(
            f"the prompt is too long: it has {num_tokens} tokens and asks for {max_new_tokens} "
            f"more, but prompt and answer together may have at most {max_tokens}"
        )
        self.num_tokens = num_tokens
        self.max_new_tokens = max_new_tokens
        self.max_tokens = max_tokens


class InvalidAdapterId(InvalidRequest):
    code = "invalid_adapter_id"


class GrammarDeadEnd(InvalidRequest):
    """No token may follow, and the answer is not complete. It shows when it is reached."""

    code = "grammar_dead_end"

    def __init__(self, num_tokens: int) -> None:
        super().__init__(
            f"after {num_tokens} tokens the grammar, or its limits, admit no next token of this "
            "model's vocabulary, and the answer is not complete"
        )
        self.num_tokens = num_tokens


class AdapterNotFound(JLoraxError):
    code = "adapter_not_found"

    def __init__(self, adapter_id: str) -> None:
        super().__init__(f"no adapter is named {adapter_id!r}")
        self.adapter_id = adapter_id


class AdapterGated(AdapterNotFound):
    """It is there, but not for this server's account."""

    def __init__(self, adapter_id: str, remote: str) -> None:
        super().__init__(adapter_id)
        self.args = (
            f"the adapter {adapter_id!r} is gated: the account of this server's token has to be "
            f"granted access to it on the remote {remote!r}",
        )


class AdapterInvalid(JLoraxError):
    """The adapter's files cannot be served; ``file`` says which one is at fault."""

    code = "adapter_invalid"

    def __init__(self, adapter: str, file: str, reason: str) -> None:
        super().__init__(f"adapter {adapter!r}: {file}: {reason}")
        self.adapter = adapter
        self.file = file
        self.reason = reason


class UnsupportedAdapter(AdapterInvalid):
    """A feature of PEFT that would change the numbers and is not computed here."""

    code = "adapter_unsupported"

    def __init__(self, adapter: str, file: str, feature: str, reason: str) -> None:
        super().__init__(adapter, file, f"{feature} is not supported: {reason}")
        self.feature = feature


class AdapterChanged(AdapterInvalid):
    """Its files became others while they were read: the next request gets the new ones."""

    code = "adapter_changed"

    def __init__(self, adapter: str, file: str) -> None:
        super().__init__(adapter, file, "changed while it was loaded")


class AdapterConflict(JLoraxError):
    code = "adapter_conflict"


class SourceUnavailable(JLoraxError):
    """A remote is down, slow or lying, or there is no room for what it sends. Try again later."""

    code = "source_unavailable"

    def __init__(self, remote: str, reason: str) -> None:
        super().__init__(f"the remote {remote!r} {reason}")
        self.remote = remote
        self.reason = reason


class Overloaded(JLoraxError):
    code = "overloaded"

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Unavailable(JLoraxError):
    code = "unavailable"

    def __init__(self, message: str, retry_after_s: float = 5.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Unauthorized(JLoraxError):
    """No API key came with the request, or one that the server does not know."""

    code = "invalid_api_key"


class Forbidden(JLoraxError):
    """Who asks may not do that."""

    code = "forbidden"


class RequestCancelled(JLoraxError):
    code = "cancelled"


class ModelInvalid(JLoraxError):
    code = "model_invalid"


class UnsupportedModel(ModelInvalid):
    code = "model_unsupported"


class NotFound(JLoraxError):
    """Of files and jobs; adapters have an error of their own."""

    code = "object_not_found"

    def __init__(self, kind: str, name: str) -> None:
        super().__init__(f"there is no {kind} {name[:64]!r}")
        self.kind = kind


class StorageFull(JLoraxError):
    code = "storage_full"


class TrainingConflict(JLoraxError):
    code = "training_conflict"


class DataInvalid(JLoraxError):
    """A row of training data cannot be used."""

    code = "data_invalid"

    def __init__(self, row: int, reason: str) -> None:
        super().__init__(f"row {row} of the data {reason}")
        self.row = row


class TrainingFailed(JLoraxError):
    """A training in another process ended without an adapter; ``code`` is its error's."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class TrainingDiverged(JLoraxError):
    """Loss or gradients are no numbers any more."""

    code = "training_diverged"


class ConfigError(JLoraxError):
    code = "config"
