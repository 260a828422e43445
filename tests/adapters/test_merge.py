"""PEFT's ``add_weighted_adapter`` is the truth: its merged B @ A, module by module."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from jlorax.adapters.merge import (  # noqa: E402
    Masks,
    check_merge,
    merge_adapters,
    merge_name,
    merge_of,
    scaled,
    seeded_masks,
)
from jlorax.adapters.pack import pack  # noqa: E402
from jlorax.adapters.peft import Adapter, LayerWeights, read_adapter  # noqa: E402
from jlorax.adapters.peft_config import parse_config  # noqa: E402
from jlorax.adapters.registry import is_valid_id  # noqa: E402
from jlorax.errors import AdapterInvalid, InvalidParameter, InvalidRequest  # noqa: E402
from jlorax.layout import BankLayout  # noqa: E402
from jlorax.types import (  # noqa: E402
    MAX_MERGED_ADAPTERS,
    AdapterMerge,
    GenerateRequest,
    MajoritySign,
    MergeStrategy,
    Projection,
)
from tests.adapters import helpers  # noqa: E402
from tests.adapters.test_peft_parity import (  # noqa: E402
    NUM_LAYERS,
    falcon,
    llama,
    lora_modules,
    projections_of,
)

MAX_RANK = 64
DARE = (MergeStrategy.DARE_LINEAR, MergeStrategy.DARE_TIES)
OF_EQUAL_RANKS = (MergeStrategy.LINEAR, MergeStrategy.TIES, *DARE)
DENSITIES = {MergeStrategy.TIES: 0.4, **dict.fromkeys(DARE, 0.7)}


def mistral() -> Any:
    config = transformers.MistralConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return transformers.MistralForCausalLM(config)


def _lora(targets: list[str], rank: int, alpha: float, **changes: Any) -> dict[str, Any]:
    return {"r": rank, "lora_alpha": alpha, "target_modules": targets, **changes}


MODELS = {"llama": llama, "falcon": falcon, "mistral": mistral}
TARGETS = {
    "llama": ("q_proj", "v_proj", "down_proj", "lm_head"),
    "falcon": ("query_key_value", "dense", "dense_4h_to_h", "lm_head"),
    "mistral": ("q_proj", "k_proj", "up_proj", "o_proj"),
}


def configs(architecture: str) -> dict[str, dict[str, Any]]:
    """a, b and c have one rank; x, y and z others. No two have the same targets or scalings."""
    one, two, three, four = TARGETS[architecture]
    return {
        "a": _lora([one, two, three], 6, 12),
        "b": _lora([one, two], 6, 3, use_rslora=True),
        "c": _lora([one, three, four], 6, 9, alpha_pattern={three: 2}),
        "x": _lora([one, two, three], 2, 12),
        "y": _lora([one, four], 5, 3, use_rslora=True, rank_pattern={one: 7}),
        "z": _lora([one, three, two], 8, 9, rank_pattern={two: 3}, alpha_pattern={three: 2}),
    }


@dataclass(frozen=True)
class World:
    """PEFT's model with its adapters, and the same ones as we read them."""

    model: Any
    projections: tuple[Projection, ...]
    adapters: dict[str, Adapter]

    def parts(self, merge: AdapterMerge) -> list[Adapter]:
        return [self.adapters[name] for name in merge.adapter_ids]

    def ours(self, merge: AdapterMerge, masks: Masks | None = None) -> dict[str, np.ndarray]:
        return self.deltas(merge_adapters(self.parts(merge), merge, MAX_RANK, masks))

    def deltas(self, adapter: Adapter) -> dict[str, np.ndarray]:
        """Module -> f64[d_out, d_in]."""
        return {
            p.module(layer): _delta(weights)
            for p in self.projections
            for layer, weights in adapter.weights.get(p.name, {}).items()
        }

    def theirs(self, merge: AdapterMerge) -> dict[str, np.ndarray]:
        """Without the scaling of the result, which is 1 but where rsLoRA comes first."""
        self.model.add_weighted_adapter(
            list(merge.adapter_ids),
            list(merge.weights),
            "merged",
            combination_type=merge.strategy.value,
            svd_rank=merge.rank,
            density=merge.density,
            majority_sign_method=merge.majority_sign.value,
        )
        try:
            return {
                name: (module.lora_B["merged"].weight @ module.lora_A["merged"].weight)
                .detach()
                .double()
                .numpy()
                for name, module in lora_modules(self.model)
                if "merged" in module.lora_A
            }
        finally:
            self.model.delete_adapter("merged")


def _delta(weights: LayerWeights) -> np.ndarray:
    product = weights.b.astype(np.float64) @ weights.a.astype(np.float64)
    return float(weights.scaling) * product


def open_world(model: Any, folder: Path, made: dict[str, dict[str, Any]]) -> World:
    projections = projections_of(model)
    adapted = None
    for name, changes in made.items():
        config = peft.LoraConfig(task_type="CAUSAL_LM", **changes)
        if adapted is None:
            adapted = peft.get_peft_model(model, config, adapter_name=name)
        else:
            adapted.add_adapter(name, config)
    assert adapted is not None
    torch.manual_seed(0)
    for _, module in lora_modules(adapted):
        for side in (*module.lora_A.values(), *module.lora_B.values()):
            torch.nn.init.normal_(side.weight)
    adapted.save_pretrained(str(folder))
    read = {name: read_adapter(folder / name, name, projections, MAX_RANK) for name in made}
    return World(adapted, projections, read)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, World]:
    return {
        name: open_world(make(), tmp_path_factory.mktemp(name), configs(name))
        for name, make in MODELS.items()
    }


@pytest.fixture(scope="module")
def world(worlds: dict[str, World]) -> World:
    return worlds["llama"]


def check_same(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    assert ours.keys() == theirs.keys() and theirs
    for module, expected in theirs.items():
        error = np.abs(ours[module] - expected).max()
        assert error <= 1e-5 * np.abs(expected).max(), (module, error)


def merge(
    names: str, *weights: float, strategy: MergeStrategy = MergeStrategy.LINEAR, **changes: Any
) -> AdapterMerge:
    return AdapterMerge(tuple(names), weights, strategy, **changes)


# ---- the values


@pytest.mark.parametrize("architecture", MODELS)
@pytest.mark.parametrize("sign", MajoritySign)
@pytest.mark.parametrize("strategy", OF_EQUAL_RANKS)
@pytest.mark.parametrize("density", ["some", "all"])
def test_equal_ranks(
    worlds: dict[str, World],
    architecture: str,
    strategy: MergeStrategy,
    sign: MajoritySign,
    density: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Different targets, alphas and rsLoRA; a negative weight."""
    world = worlds[architecture]
    kept = DENSITIES.get(strategy, 1.0) if density == "some" else 1.0
    asked = merge("acb", 0.7, 1.3, -0.4, strategy=strategy, density=kept, majority_sign=sign)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "bernoulli", _peft_masks(world, asked))
        theirs = world.theirs(asked)
    check_same(world.ours(asked, _our_masks(world, asked)), theirs)


@pytest.mark.parametrize("architecture", MODELS)
@pytest.mark.parametrize(
    ("strategy", "rank"),
    [
        (MergeStrategy.CAT, None),
        (MergeStrategy.SVD, None),
        (MergeStrategy.SVD, 1),
        (MergeStrategy.SVD, 4),
        (MergeStrategy.SVD, 7),
    ],
)
def test_unequal_ranks(
    worlds: dict[str, World], architecture: str, strategy: MergeStrategy, rank: int | None
) -> None:
    world = worlds[architecture]
    asked = merge("xzy", 0.7, -1.3, 2.0, strategy=strategy, rank=rank)
    check_same(world.ours(asked), world.theirs(asked))


def test_strategies_differ(world: World) -> None:
    """Or a strategy that is ignored would pass."""
    found = [
        world.ours(merge("ac", 0.7, 1.3, strategy=s, density=d, majority_sign=m))
        for s, d, m in (
            (MergeStrategy.LINEAR, 1.0, MajoritySign.TOTAL),
            (MergeStrategy.TIES, 1.0, MajoritySign.TOTAL),
            (MergeStrategy.TIES, 0.5, MajoritySign.TOTAL),
            (MergeStrategy.DARE_LINEAR, 0.5, MajoritySign.TOTAL),
            (MergeStrategy.DARE_TIES, 0.5, MajoritySign.TOTAL),
            (MergeStrategy.DARE_TIES, 0.5, MajoritySign.FREQUENCY),
            (MergeStrategy.CAT, 1.0, MajoritySign.TOTAL),
            (MergeStrategy.SVD, 1.0, MajoritySign.TOTAL),
        )
    ]
    module = "model.layers.0.self_attn.q_proj"
    assert len({deltas[module].round(3).tobytes() for deltas in found}) == len(found)


def test_cat_is_the_exact_sum_and_a_full_svd_too(world: World) -> None:
    asked = merge("xz", 0.7, -1.3, strategy=MergeStrategy.CAT)
    x, z = (world.deltas(world.adapters[name]) for name in "xz")
    expected = {module: -1.3 * delta for module, delta in z.items()}
    for module, delta in x.items():
        expected[module] = 0.7 * delta + expected.get(module, 0.0)
    check_same(world.ours(asked), expected)
    check_same(world.ours(replace(asked, strategy=MergeStrategy.SVD, rank=10)), expected)


def test_values_of_equal_size_at_the_border_are_kept_to_the_count() -> None:
    """As bfloat16 files have them; PEFT keeps as many, and leaves open which."""
    a = np.array([[2, -1, 1, 1], [-3, 1, 0, 0.5]], np.float32)
    parts = [of_one_module(a), of_one_module(a)]
    asked = merge("ab", 1.0, 0.0, strategy=MergeStrategy.TIES, density=0.5)
    kept = merge_adapters(parts, asked, 8).weights["q_proj"][0].a * 2
    assert kept.tolist() == [[2, -1, 1, 0], [-3, 0, 0, 0]]


def test_a_density_that_keeps_nothing_gives_zeros(world: World) -> None:
    asked = merge("ac", 1.0, 1.0, strategy=MergeStrategy.TIES, density=1e-6)
    assert all(not delta.any() for delta in world.ours(asked).values())
    assert all(not delta.any() for delta in world.theirs(asked).values())


def test_weights_of_zero_and_of_each_other_s_opposite(world: World) -> None:
    for strategy in (*OF_EQUAL_RANKS, MergeStrategy.CAT, MergeStrategy.SVD):
        nothing = world.ours(merge("ac", 0.0, 0.0, strategy=strategy, density=0.5))
        assert all(not delta.any() for delta in nothing.values())
    asked = merge("aa", 1.0, -1.0, strategy=MergeStrategy.SVD)
    largest = max(np.abs(delta).max() for delta in world.deltas(world.adapters["a"]).values())
    for delta in world.ours(asked).values():
        assert np.abs(delta).max() < 1e-6 * largest


def test_an_adapter_named_twice_is_two_parts(world: World) -> None:
    for strategy in (MergeStrategy.LINEAR, MergeStrategy.TIES, MergeStrategy.CAT):
        asked = merge("aca", 0.5, 1.0, 0.25, strategy=strategy, density=0.8)
        check_same(world.ours(asked), world.theirs(asked))


def of_one_module(a: np.ndarray) -> Adapter:
    """Of scaling 1."""
    rank = len(a)
    config = parse_config(json.dumps(helpers.config(r=rank, lora_alpha=rank)).encode(), "a")
    weights = LayerWeights(a, np.ones((3, rank), a.dtype), np.float32(1))
    return Adapter("a", config, {"q_proj": {0: weights}})


@pytest.mark.parametrize("strategy", MergeStrategy)
@pytest.mark.parametrize("name", ["b", "z"])
def test_a_part_alone_is_only_scaled(world: World, strategy: MergeStrategy, name: str) -> None:
    asked = merge(name, -0.6, strategy=strategy, density=0.3, rank=1)
    check_same(world.ours(asked), world.theirs(asked))
    whole = world.adapters[name]
    made = merge_adapters([whole], replace(asked, weights=(1.0,)), MAX_RANK)
    for ours, theirs in zip(_layers(made), _layers(whole), strict=True):
        assert ours.a is theirs.a and ours.b is theirs.b and ours.scaling == theirs.scaling
    assert made.config == whole.config


@pytest.mark.parametrize("factor", [0.0, 0.3, 1.0, -2.0])
def test_scaled_is_a_cat_of_one_and_its_config_says_so(world: World, factor: float) -> None:
    made = scaled(world.adapters["z"], factor)
    asked = merge("zz", factor, 0.0, strategy=MergeStrategy.CAT)
    check_same(world.deltas(made), world.ours(asked))
    for projection in world.projections:
        for layer, weights in made.weights.get(projection.name, {}).items():
            said = np.float32(made.config.scaling(projection.module(layer)))
            np.testing.assert_allclose(weights.scaling, said, rtol=1e-6)


def test_a_merge_says_its_rank_and_targets_as_peft_s_does(world: World) -> None:
    model = world.model
    for asked in (
        merge("bc", 1, 1),
        merge("xz", 1, 1, strategy=MergeStrategy.CAT),
        merge("xz", 1, 1, strategy=MergeStrategy.SVD),
        merge("xz", 1, 1, strategy=MergeStrategy.SVD, rank=4),
    ):
        made = merge_adapters(world.parts(asked), asked, MAX_RANK)
        model.add_weighted_adapter(
            list(asked.adapter_ids), [1, 1], "m", asked.strategy.value, svd_rank=asked.rank
        )
        said = model.peft_config["m"]
        model.delete_adapter("m")
        assert (made.config.r, made.config.alpha) == (said.r, said.lora_alpha)
        assert set(made.config.target_names) == set(said.target_modules)
        assert max(made.ranks.values()) <= made.config.r
        assert all(w.scaling == 1 and made.config.scaling("any") == 1 for w in _layers(made))


def test_svd_is_no_larger_than_its_parts(world: World) -> None:
    asked = merge("xz", 1.0, 1.0, strategy=MergeStrategy.SVD, rank=MAX_RANK + 1)
    made = merge_adapters(world.parts(asked), asked, MAX_RANK)
    assert made.config.r == 2 + 8 and made.ranks["q_proj"] == 2 + 8


def test_files_in_half_precision_are_merged_in_float32(world: World) -> None:
    parts = [_as_dtype(world.adapters[name], ml_dtypes.bfloat16) for name in "acb"]
    wide = [_as_dtype(part, np.float32) for part in parts]
    for strategy in (MergeStrategy.LINEAR, MergeStrategy.TIES, MergeStrategy.SVD):
        asked = merge("acb", 0.7, 1.3, 0.4, strategy=strategy, density=0.9)
        ours, theirs = (merge_adapters(p, asked, MAX_RANK) for p in (parts, wide))
        check_same(world.deltas(ours), world.deltas(theirs))
        assert all(w.a.dtype == w.b.dtype == np.float32 for w in _layers(ours))
    votes = [np.array([[value]], ml_dtypes.bfloat16) for value in (256, -0.5, -256)]
    asked = merge("abc", 1.0, 1.0, 1.0, strategy=MergeStrategy.TIES)
    elected = merge_adapters([of_one_module(vote) for vote in votes], asked, 8)
    assert elected.weights["q_proj"][0].a == -256.5 / 2  # in bfloat16 they sum up to 0


def test_a_merge_packs_as_any_adapter(world: World) -> None:
    layout = BankLayout(world.projections, "float32", MAX_RANK)
    asked = merge("xy", 1.0, 1.0, strategy=MergeStrategy.CAT)
    packed = pack(merge_adapters(world.parts(asked), asked, MAX_RANK), layout)
    assert packed.ranks["q_proj"] == 2 + 7 and packed.ranks["v_proj"] == 2
    assert set(np.unique(packed.scaling)) == {0, 1}


# ---- where PEFT is wrong


def test_rslora_first_gives_what_it_gives_last(world: World) -> None:
    """PEFT 0.21 makes the first of these sqrt(6) times as strong."""
    first = world.ours(merge("ba", 0.5, 2.0))
    check_same(first, world.ours(merge("ab", 2.0, 0.5)))
    check_same(first, world.theirs(merge("ba", 0.5, 2.0)))


def test_layers_that_the_first_part_leaves_out_are_the_others(tmp_path: Path) -> None:
    """PEFT drops them without a word."""
    made = {
        "a": _lora(["q_proj"], 4, 8, layers_to_transform=[0]),
        "b": _lora(["q_proj", "v_proj"], 4, 2, exclude_modules=r".*layers\.2\..*"),
    }
    world = open_world(llama(), tmp_path, made)
    for strategy in (MergeStrategy.LINEAR, MergeStrategy.CAT, MergeStrategy.SVD):
        asked = merge("ab", 0.7, -1.3, strategy=strategy)
        ours, theirs = world.ours(asked), world.theirs(asked)
        own = {module: -1.3 * delta for module, delta in world.deltas(world.adapters["b"]).items()}
        assert theirs.keys() < ours.keys()
        check_same({module: ours[module] for module in theirs}, theirs)
        left_out = ours.keys() - theirs.keys()
        assert {module.split(".")[2] for module in left_out} == {"1"}
        check_same({m: ours[m] for m in left_out}, {m: own[m] for m in left_out})


# ---- DARE's masks


def test_masks_keep_their_share_and_follow_the_seed() -> None:
    shape = (100, 1000)
    masks = seeded_masks(7)
    first, second = masks(shape, 0.3), masks(shape, 0.3)
    assert first.dtype == bool and first.shape == shape
    sigma = math.sqrt(0.3 * 0.7 / first.size)
    assert abs(first.mean() - 0.3) < 5 * sigma
    assert abs((first & second).mean() - 0.09) < 5 * sigma  # independent
    assert np.array_equal(seeded_masks(7)(shape, 0.3), first)
    assert not np.array_equal(seeded_masks(8)(shape, 0.3), first)


@pytest.mark.parametrize("strategy", DARE)
def test_equal_seeds_merge_equally(world: World, strategy: MergeStrategy) -> None:
    asked = merge("ac", 0.7, 1.3, strategy=strategy, density=0.5, seed=3)
    check_same(world.ours(asked), world.ours(asked, seeded_masks(3)))
    other = world.ours(replace(asked, seed=4))
    assert any(not np.allclose(delta, other[m]) for m, delta in world.ours(asked).items())


def _mask(world: World, asked: AdapterMerge, module: str) -> Iterator[np.ndarray]:
    """Of each part that adapts the module, for A and then for B: another for each."""
    path = {
        p.module(layer): (p.name, layer) for p in world.projections for layer in range(p.num_layers)
    }
    name, layer = path[module]
    for side in "ab":
        for part in world.parts(asked):
            if layer in part.weights.get(name, {}):
                seed = zlib.crc32(f"{module} {side} {part.adapter_id}".encode())
                shape = getattr(part.weights[name][layer], side).shape
                yield np.random.default_rng(seed).random(shape) < asked.density


def _peft_masks(world: World, asked: AdapterMerge) -> Any:
    """In PEFT's order of modules."""
    modules = _adapted(world, asked, (name for name, _ in lora_modules(world.model)))
    masks = (mask for module in modules for mask in _mask(world, asked, module))

    def bernoulli(probabilities: Any) -> Any:
        mask = next(masks)
        assert mask.shape == tuple(probabilities.shape)
        assert np.allclose(probabilities.numpy(), asked.density)
        return torch.from_numpy(mask.astype(np.float32))

    return bernoulli


def _our_masks(world: World, asked: AdapterMerge) -> Masks:
    """In ours."""
    names = dict.fromkeys(name for part in world.parts(asked) for name in part.weights)
    path = {p.name: p for p in world.projections}
    every = (path[name].module(n) for name in names for n in range(path[name].num_layers))
    modules = _adapted(world, asked, every)
    masks = (mask for module in modules for mask in _mask(world, asked, module))

    def drawn(shape: tuple[int, ...], density: float) -> np.ndarray:
        mask = next(masks)
        assert mask.shape == shape and density == asked.density
        return mask

    return drawn


def _adapted(world: World, asked: AdapterMerge, modules: Iterable[str]) -> list[str]:
    adapted = {module for part in world.parts(asked) for module in world.deltas(part)}
    return [module for module in modules if module in adapted]


# ---- what is refused


@pytest.mark.parametrize("strategy", OF_EQUAL_RANKS)
def test_ranks_that_must_be_equal(world: World, strategy: MergeStrategy) -> None:
    asked = merge("axz", 1.0, 1.0, 1.0, strategy=strategy, density=0.5)
    with pytest.raises(
        AdapterInvalid, match=rf"{strategy.value} .* 6, 2, 8; cat and svd"
    ) as caught:
        world.ours(asked)
    assert caught.value.adapter == "a + x + z"
    with pytest.raises(ValueError, match="same r value"):
        world.theirs(asked)


def test_ranks_that_differ_in_a_module_alone(tmp_path: Path) -> None:
    made = {
        "a": _lora(["q_proj", "v_proj"], 4, 8),
        "b": _lora(["q_proj", "v_proj"], 4, 8, rank_pattern={r"layers\.1\..*v_proj": 2}),
    }
    world = open_world(llama(), tmp_path, made)
    with pytest.raises(AdapterInvalid, match=r"in layer 1 of v_proj they have 4, 2; cat and svd"):
        world.ours(merge("ab", 1.0, 1.0))
    with pytest.raises(RuntimeError):
        world.theirs(merge("ab", 1.0, 1.0))


def test_ranks_above_the_bank_s(world: World) -> None:
    cat = merge("ayz", 1.0, 1.0, 1.0, strategy=MergeStrategy.CAT)
    parts = world.parts(cat)
    assert merge_adapters(parts, cat, 21).config.r == 6 + 7 + 8
    with pytest.raises(AdapterInvalid, match=r"cat of the ranks 6, 7, 8 gives rank 21.* 20; svd"):
        merge_adapters(parts, cat, 20)
    svd = replace(cat, strategy=MergeStrategy.SVD, rank=12)
    assert merge_adapters(parts, svd, 12).config.r == 12
    with pytest.raises(AdapterInvalid, match=r"rank 12, above the limit of 11"):
        merge_adapters(parts, svd, 11)


@pytest.mark.parametrize("strategy", MergeStrategy)
def test_values_that_float32_cannot_hold(world: World, strategy: MergeStrategy) -> None:
    for weight in (1e39, 1e308):
        with pytest.raises(AdapterInvalid, match="too large for float32"):
            world.ours(merge("ac", weight, 1.0, strategy=strategy, density=0.5))
        with pytest.raises(AdapterInvalid, match="too large for float32"):
            world.ours(merge("a", weight, strategy=strategy))
    if strategy in (MergeStrategy.CAT, MergeStrategy.SVD):
        with pytest.raises(AdapterInvalid, match=r"values of layer 0 of q_proj are too large"):
            world.ours(merge("ac", 1.6e38, 1.0, strategy=strategy))


WRONG: dict[str, tuple[str, AdapterMerge]] = {
    "nobody": ("1 to 16, not 0", merge("")),
    "a crowd": ("1 to 16, not 17", merge("a" * 17, *[1.0] * 17)),
    "fewer weights": ("2, one an adapter, not 1", merge("ab", 1.0)),
    "more weights": ("2, one an adapter, not 3", merge("ab", 1.0, 1.0, 1.0)),
    "NaN": ("finite numbers, not nan", merge("ab", 1.0, math.nan)),
    "infinite": ("finite numbers, not -inf", merge("ab", 1.0, -math.inf)),
    "density 0": ("density` .*not 0", merge("ab", 1.0, 1.0, density=0.0)),
    "density above 1": ("density` .*not 1.5", merge("ab", 1.0, 1.0, density=1.5)),
    "density NaN": ("density` .*not nan", merge("ab", 1.0, 1.0, density=math.nan)),
    "rank 0": ("rank` .*not 0", merge("ab", 1.0, 1.0, rank=0)),
    "seed": ("seed` .*not -1", merge("ab", 1.0, 1.0, seed=-1)),
    "strategy": ("strategy` .*'linear'", merge("ab", 1.0, 1.0, strategy="linear")),  # type: ignore[arg-type]
    "sign": ("majority_sign` .*'total'", merge("ab", 1.0, 1.0, majority_sign="total")),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_no_adapters_can_make_right(case: str) -> None:
    message, asked = WRONG[case]
    with pytest.raises(InvalidParameter, match=message):
        check_merge(asked)
    with pytest.raises(InvalidParameter, match=message):
        merge_of(GenerateRequest((1,), merge=asked))


def test_the_most_and_the_least_that_is_allowed() -> None:
    most = MAX_MERGED_ADAPTERS
    check_merge(merge("a" * most, *[-1.0] * most, density=1e-9, rank=1))
    check_merge(merge("a", 0.0, density=1.0, seed=2**64))


# ---- what a request asks for


def test_the_merge_of_a_request() -> None:
    asked = merge("ab", 0.5, -2.0, strategy=MergeStrategy.TIES, density=0.5)
    assert merge_of(GenerateRequest((1,))) is None
    assert merge_of(GenerateRequest((1,), adapter_id="a")) is None
    assert merge_of(GenerateRequest((1,), merge=asked)) == asked
    twice = merge_of(GenerateRequest((1,), merge=asked, adapter_scale=2.0))
    assert twice == replace(asked, weights=(1.0, -4.0))
    assert merge_of(GenerateRequest((1,), adapter_id="a", adapter_scale=0.5)) == merge(
        "a", 0.5, strategy=MergeStrategy.CAT
    )


@pytest.mark.parametrize("strategy", MergeStrategy)
@pytest.mark.parametrize("scale", [0.5, -3.0])
def test_a_merge_is_proportional_to_its_weights(
    world: World, strategy: MergeStrategy, scale: float
) -> None:
    asked = merge("ac", 0.7, -1.3, strategy=strategy, density=0.5, rank=3)
    request = GenerateRequest((1,), merge=asked, adapter_scale=scale)
    made = merge_of(request)
    assert made is not None
    expected = {module: scale * delta for module, delta in world.ours(asked).items()}
    check_same(world.ours(made), expected)


def test_requests_that_say_two_things_or_scale_nothing() -> None:
    with pytest.raises(InvalidRequest, match="'x' and a merge"):
        merge_of(GenerateRequest((1,), adapter_id="x", merge=merge("a", 1.0)))
    with pytest.raises(InvalidParameter, match=r"0\.5, but the request names no adapter"):
        merge_of(GenerateRequest((1,), adapter_scale=0.5))
    for scale in (math.nan, math.inf):
        with pytest.raises(InvalidParameter, match=f"finite number, not {scale}"):
            merge_of(GenerateRequest((1,), adapter_id="a", adapter_scale=scale))


# ---- its name


def test_a_name_says_everything_but_the_names() -> None:
    asked = merge("ab", 0.5, 1, strategy=MergeStrategy.DARE_TIES, density=0.5)
    others = [
        replace(asked, weights=(1, 0.5)),
        replace(asked, weights=(0.5, math.nextafter(1, 2))),
        replace(asked, strategy=MergeStrategy.TIES),
        replace(asked, density=0.25),
        replace(asked, majority_sign=MajoritySign.FREQUENCY),
        replace(asked, rank=4),
        replace(asked, seed=1),
    ]
    names = {merge_name(other, ("one", "two")) for other in (asked, *others)}
    contents = [("two", "one"), ("one", "three"), ("on", "etwo"), ('one", "two', "")]
    names |= {merge_name(asked, content) for content in contents}
    assert len(names) == 1 + len(others) + len(contents)
    same = replace(asked, adapter_ids=("x", "y"), weights=(0.5, 1.0))
    assert merge_name(same, ("one", "two")) == merge_name(asked, ("one", "two"))


def test_a_name_is_the_same_tomorrow_and_no_adapter_s() -> None:
    """The disk tier keeps it; what changes it has to change what is merged too."""
    name = merge_name(merge("ab", 0.5, 1.0), ("one", "two"))
    assert name == "merge:dc868380b103d073fb97c2296fd01f4e4f674d40a8d0d92bb3924de119374fd1"
    assert not is_valid_id(name)


def _layers(adapter: Adapter) -> Iterator[LayerWeights]:
    for layers in adapter.weights.values():
        yield from layers.values()


def _as_dtype(adapter: Adapter, dtype: Any) -> Adapter:
    weights = {
        name: {n: replace(w, a=w.a.astype(dtype), b=w.b.astype(dtype)) for n, w in layers.items()}
        for name, layers in adapter.weights.items()
    }
    return replace(adapter, weights=weights)
