"""A remote's line of the server's configuration, and how patient the server is with it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import SplitResult, parse_qsl, urlsplit

from jlorax.errors import ConfigError

_NAME = re.compile(r"[a-z0-9_-]+")
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,62}")
_REGION = re.compile(r"[A-Za-z0-9-]+")
_OPTIONS = ("endpoint", "region", "anonymous")
_HUB_URLS = ("hub", "hub://")


@dataclass(frozen=True)
class FetchLimits:
    """What a remote may take. ``overall_s`` bounds a fetch, ``describe_s`` a description."""

    connect_s: float = 5
    read_s: float = 15  # without a byte
    describe_s: float = 30
    overall_s: float = 300
    max_tries: int = 3
    backoff_s: float = 0.5  # before the second try, twice as much before each later one
    slowest_bytes_per_s: int = 64 * 1024
    slow_window_s: float = 10  # over which the speed is looked at

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value <= 0:
                raise ConfigError(f"{name} is {value}, must be more than 0")


@dataclass(frozen=True)
class S3Location:
    """Where adapters lie. None: as the environment says (AWS_ENDPOINT_URL, AWS_REGION)."""

    bucket: str
    prefix: str  # without "/" at its ends; "" is the whole bucket
    endpoint: str | None = None
    region: str | None = None
    anonymous: bool = False


@dataclass(frozen=True)
class Remote:
    """A named source of adapters. ``s3`` None: the Hugging Face hub that HF_ENDPOINT names."""

    name: str
    s3: S3Location | None = None

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ConfigError(
                f"remote {self.name!r}: a name has the characters a-z, 0-9, '_' and '-' only"
            )


def parse_remote(name: str, url: str) -> Remote:
    """``hub``, or ``s3://bucket/prefix?endpoint=http://...&region=...&anonymous=true``.

    Raises ConfigError with the reason; it never shows the URL, which may have a secret in it.
    """
    if url in _HUB_URLS:
        return Remote(name)
    try:
        return Remote(name, _parse_s3(urlsplit(url)))
    except ValueError as error:
        raise ConfigError(f"remote {name!r}: {error}") from None


def _parse_s3(url: SplitResult) -> S3Location:
    if url.scheme == "hub":
        raise ValueError("'hub' takes no address: HF_ENDPOINT names the hub")
    if url.scheme != "s3":
        raise ValueError("it must be 'hub' or begin with 's3://'")
    _refuse_secrets(url)
    if not _BUCKET.fullmatch(url.netloc):
        raise ValueError(f"{url.netloc!r} is no bucket's name")
    options = _options(url.query)
    return S3Location(
        bucket=url.netloc,
        prefix=_prefix(url.path),
        endpoint=_endpoint(options.get("endpoint")),
        region=_region(options.get("region")),
        anonymous=_flag("anonymous", options.get("anonymous", "false")),
    )


def _refuse_secrets(url: SplitResult) -> None:
    if "@" in url.netloc:
        raise ValueError("credentials come from the environment, not from the address")


def _prefix(path: str) -> str:
    prefix = path.strip("/")
    parts = prefix.split("/") if prefix else []
    if bad := [part for part in parts if part in ("", ".", "..") or not part.isprintable()]:
        raise ValueError(f"its prefix has the part {bad[0]!r}")
    return prefix


def _options(query: str) -> dict[str, str]:
    pairs = parse_qsl(query, keep_blank_values=True)
    options = dict(pairs)
    if len(options) != len(pairs):
        raise ValueError("an option is given twice")
    if unknown := [key for key in options if key not in _OPTIONS]:
        raise ValueError(f"it has no option {unknown[0]!r}, only {', '.join(_OPTIONS)}")
    return options


def _endpoint(text: str | None) -> str | None:
    if text is None:
        return None
    url = urlsplit(text)
    _refuse_secrets(url)
    if url.scheme not in ("http", "https") or not url.hostname or url.query or url.fragment:
        raise ValueError("its endpoint must be http://host or https://host, with a port if need be")
    return text.rstrip("/")


def _region(text: str | None) -> str | None:
    if text is not None and not _REGION.fullmatch(text):
        raise ValueError(f"{text!r} is no region's name")
    return text


def _flag(name: str, text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError(f"{name} must be true or false, not {text!r}")
    return text == "true"
