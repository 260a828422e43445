"""Which adapter a request runs with: by name, merged, scaled."""

from __future__ import annotations

from typing import Any

import pytest

from jlorax.errors import InvalidAdapterId, InvalidParameter
from jlorax.types import AdapterMerge, MajoritySign, MergeStrategy
from tests.wire_calls import chat, completion, completion_call

IDS = ["a", "org/b"]


def merged(**merge: Any) -> AdapterMerge:
    request = completion(merged_adapters={"ids": IDS, **merge})
    assert request.merge is not None
    assert chat(merged_adapters={"ids": IDS, **merge}).requests[0].merge == request.merge
    return request.merge


def test_a_merge_is_read() -> None:
    assert merged() == AdapterMerge(("a", "org/b"), (1.0, 1.0))
    assert merged(weights=[2, 0.3]).weights == (2.0, 0.3)
    assert merged(weights=[]).weights == (1.0, 1.0)
    found = merged(
        weights=[1, -1], merge_strategy="TIES", density=0.2, majority_sign_method="frequency"
    )
    assert found == AdapterMerge(
        ("a", "org/b"), (1.0, -1.0), MergeStrategy.TIES, 0.2, MajoritySign.FREQUENCY
    )
    assert merged(merge_strategy="svd", rank=4).rank == 4
    assert merged(merge_strategy="dare_linear", density=1, seed=7).seed == 7
    assert {merged(merge_strategy=word, density=0.5).strategy.value for word in (
        "linear", "ties", "dare_linear", "dare_ties", "cat", "svd",
    )} == {strategy.value for strategy in MergeStrategy}  # fmt: skip


def test_what_a_strategy_does_not_read_makes_no_other_merge() -> None:
    """lorax-client always sends a density."""
    assert merged(density=0.0, majority_sign_method="frequency") == merged(merge_strategy="linear")
    assert merged(merge_strategy="cat", density=0.5) == merged(merge_strategy="cat")


def test_a_merge_has_the_sources_and_the_answer_the_base_models_name() -> None:
    call = completion_call(merged_adapters={"ids": IDS}, adapter_source="local")
    assert call.requests[0].adapter_source == "local"
    assert call.requests[0].adapter_id is None
    assert call.model == "tiny/base"


@pytest.mark.parametrize(
    ("merge", "says"),
    [
        ({"ids": []}, "at least one adapter id"),
        ({"ids": None}, "at least one adapter id"),
        ({"ids": "a"}, "merged_adapters.ids` must be a list"),
        ({"ids": ["a", 1]}, "must hold strings, not an integer"),
        ({"ids": [f"a{i}" for i in range(1000)]}, "at most 16 ids, not 1000"),
        ({"ids": ["a", ""]}, "the base model cannot be merged"),
        ({"ids": ["tiny/base"]}, "the base model cannot be merged"),
        ({"weights": [1]}, "must match number of adapter weights. Given: 2 ids and 1 weights"),
        ({"weights": [1, None]}, "not null"),
        ({"weights": [1, "2"]}, "weights at 1` must be a number"),
        ({"weights": [1, 1e9]}, "Given: 1000000000.0"),
        ({"weights": [1, 10**400]}, "bits"),
        ({"merge_strategy": "magic"}, "linear, ties, dare_linear, dare_ties, cat, svd. Given"),
        ({"merge_strategy": 3}, "must be a string"),
        ({"majority_sign_method": "max"}, "total, frequency"),
        ({"density": 1.5}, "<= 1.0. Given: 1.5"),
        ({"density": -0.1}, "Given: -0.1"),
        ({"merge_strategy": "ties"}, "must be > 0 and <= 1 for 'ties'"),
        ({"merge_strategy": "dare_ties", "density": 0.0}, "keeps. Given: 0.0"),
        ({"rank": 4}, "is for merge_strategy 'svd', not 'linear'"),
        ({"merge_strategy": "svd", "rank": 257}, "between 1 and 256"),
        ({"seed": 1}, "'dare_linear' or 'dare_ties', not 'linear'"),
        ({"merge_strategy": "dare_linear", "density": 1, "seed": -1}, "between 0"),
        ({"weight": [1, 1]}, "`merged_adapters.weight` is no field of a merge"),
    ],
)
def test_a_wrong_merge_is_refused_by_name(merge: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidParameter) as caught:
        completion(merged_adapters={"ids": IDS, **merge})
    assert says in str(caught.value)
    assert "merged_adapters" in str(caught.value) or "weights" in str(caught.value)
    assert len(str(caught.value)) < 300


def test_a_merge_excludes_an_adapter() -> None:
    with pytest.raises(InvalidParameter, match="at most one of `adapter_id` or `adapters`"):
        completion(model="a", merged_adapters={"ids": IDS})
    with pytest.raises(InvalidParameter, match="must be an object"):
        completion(merged_adapters=IDS)
    with pytest.raises(InvalidAdapterId):
        completion(merged_adapters={"ids": ["../a"]})


def test_an_adapter_is_scaled() -> None:
    assert completion(model="a", adapter_scale=0.5).adapter_scale == 0.5
    assert completion(merged_adapters={"ids": IDS}, adapter_scale=-2).adapter_scale == -2.0
    assert completion(adapter_scale=1).adapter_scale == 1.0
    with pytest.raises(InvalidParameter, match=r"is 0\.5, but the request names no adapter"):
        completion(adapter_scale=0.5)
    for wrong in (101, -101, "1", True):
        with pytest.raises(InvalidParameter, match="adapter_scale"):
            completion(model="a", adapter_scale=wrong)
