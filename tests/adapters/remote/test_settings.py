"""A remote's line of the configuration."""

from __future__ import annotations

import pytest

from jlorax.adapters.remote import FetchLimits, Remote, S3Location, parse_remote
from jlorax.errors import ConfigError


@pytest.mark.parametrize("url", ["hub", "hub://"])
def test_the_hub_takes_no_address(url: str) -> None:
    assert parse_remote("hf", url) == Remote("hf", None)


def test_s3_with_all_options() -> None:
    url = "s3://models/some/prefix/?endpoint=http://10.0.0.1:9000/&region=eu-1&anonymous=true"
    location = S3Location("models", "some/prefix", "http://10.0.0.1:9000", "eu-1", True)
    assert parse_remote("in-house_1", url) == Remote("in-house_1", location)


def test_s3_without_options_leaves_them_to_the_environment() -> None:
    assert parse_remote("s", "s3://models").s3 == S3Location("models", "", None, None, False)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("hub://example.org", "HF_ENDPOINT"),
        ("https://example.org", "must be 'hub' or begin with 's3://'"),
        ("", "must be 'hub' or begin with 's3://'"),
        ("s3://", "'' is no bucket's name"),
        ("s3://a:80/x", "'a:80' is no bucket's name"),
        ("s3://key:secret@models", "credentials come from the environment"),
        ("s3://models/a/../b", "the part '..'"),
        ("s3://models/a//b", "the part ''"),
        ("s3://models?colour=red", "no option 'colour'"),
        ("s3://models?region=a&region=b", "given twice"),
        ("s3://models?region=a/b", "no region's name"),
        ("s3://models?endpoint=file:///etc", "endpoint must be"),
        ("s3://models?endpoint=http://key:secret@host", "credentials come from the environment"),
        ("s3://models?anonymous=yes", "anonymous must be true or false"),
    ],
)
def test_what_is_wrong_is_said(url: str, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_remote("mine", url)
    assert reason in str(caught.value)
    assert "'mine'" in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("name", ["", "Mine", "a b", "a/b", "a@b"])
def test_a_name_is_plain(name: str) -> None:
    with pytest.raises(ConfigError, match="a name has"):
        parse_remote(name, "hub")


def test_limits_are_positive() -> None:
    with pytest.raises(ConfigError, match="max_tries is 0, must be more than 0"):
        FetchLimits(max_tries=0)
