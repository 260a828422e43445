"""Sampling on the device: filters as transformers', penalties, draws, and what they depend on."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlorax.device import sampling
from jlorax.device.parts import in_parts
from jlorax.device.sampling import Books, SamplingRows
from jlorax.device.step import StepOutput
from jlorax.layout import mask_words
from pallas_kernels.sampling import xla

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

VOCAB_SIZES = (320, 1000, 4096)  # two of them end within a group of 128 lanes
OFF = {
    "temperature": 1.0,
    "top_p": 1.0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "top_k": 0,
    "num_alternatives": 0,
}
INTEGERS = ("top_k", "num_alternatives")


def logits_of(num_rows: int, vocab_size: int, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng((seed, vocab_size))
    return (random.normal(size=(num_rows, vocab_size)) * 3).astype(np.float32)


def rows_of(
    *rows: dict[str, float], seeds: list[int] | None = None, position: int = 7
) -> SamplingRows:
    columns = {
        name: jnp.asarray(
            [row.get(name, off) for row in rows], jnp.int32 if name in INTEGERS else jnp.float32
        )
        for name, off in OFF.items()
    }
    seeds = seeds or [0] * len(rows)
    return SamplingRows(
        **columns,
        seeds=jnp.asarray([(0, seed) for seed in seeds], jnp.uint32),
        positions=jnp.full((len(rows),), position, jnp.int32),
    )


def books_of(counts: jax.Array) -> Books:
    """Of rows that may draw anything."""
    num_rows, vocab_size = counts.shape
    masks = jnp.full((num_rows, mask_words(vocab_size)), -1, jnp.int32)
    return Books(counts > 0, counts, masks, jnp.zeros(counts.shape, jnp.float32))


def kept(filtered: jax.Array) -> np.ndarray:
    return np.asarray(filtered) > -np.inf


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
@pytest.mark.parametrize(
    ("ours", "warper", "values"),
    [
        ("top_k", "TopKLogitsWarper", (1, 2, 40, 319)),
        ("top_p", "TopPLogitsWarper", (0.05, 0.5, 0.9, 0.99)),
        ("min_p", "MinPLogitsWarper", (0.001, 0.05, 0.3, 0.9)),
        ("typical_p", "TypicalLogitsWarper", (0.05, 0.2, 0.9, 0.99)),
    ],
)
def test_filter_equals_transformers(
    ours: str, warper: str, values: tuple[float, ...], vocab_size: int
) -> None:
    """Each row by a value of its own, all in one batch."""
    logits = logits_of(len(values), vocab_size)
    got = kept(getattr(xla, ours)(jnp.asarray(logits), jnp.asarray(values)))
    for row, value, mine in zip(logits, values, got, strict=True):
        warped = getattr(transformers, warper)(value)(None, torch.from_numpy(row[None]))
        wanted = (warped[0] > -torch.inf).numpy()
        assert 0 < wanted.sum() < vocab_size
        np.testing.assert_array_equal(mine, wanted, err_msg=f"{warper}({value})")


@pytest.mark.parametrize("name", ["top_k", "top_p", "min_p", "typical_p"])
def test_a_row_that_asks_for_nothing_keeps_all(name: str) -> None:
    """Also beside a row that does."""
    off, on = {"top_k": (0, 3), "min_p": (0.0, 0.5)}.get(name, (1.0, 0.5))
    logits = jnp.asarray(logits_of(2, 320))
    got = kept(getattr(xla, name)(logits, jnp.asarray([off, on])))
    assert got[0].all()
    assert not got[1].all()


def test_top_k_beyond_the_vocabulary_keeps_all() -> None:
    assert kept(xla.top_k(jnp.asarray(logits_of(1, 320)), jnp.asarray([1000]))).all()


def test_filters_in_a_row_equal_transformers() -> None:
    """Temperature, top-k, top-p, min-p, typical-p, in transformers' order, by what can be drawn."""
    logits = logits_of(1, 320)
    scores = torch.from_numpy(logits)
    for warper in (
        transformers.TemperatureLogitsWarper(1.7),
        transformers.TopKLogitsWarper(30),
        transformers.TopPLogitsWarper(0.9),
        transformers.MinPLogitsWarper(0.02),
        transformers.TypicalLogitsWarper(0.8),
    ):
        scores = warper(None, scores)
    allowed = set(torch.nonzero(scores[0] > -torch.inf)[:, 0].tolist())
    asked = {"temperature": 1.7, "top_k": 30, "top_p": 0.9, "min_p": 0.02, "typical_p": 0.8}
    many = 2000
    drawn = draw(np.repeat(logits, many, 0), rows_of(*[asked] * many, seeds=list(range(many))))
    assert set(drawn.tolist()) == allowed


def test_repetition_penalty_equals_transformers() -> None:
    logits = logits_of(2, 320)
    ids = np.random.default_rng(1).integers(0, 320, (2, 40))
    seen = np.zeros(logits.shape, bool)
    np.put_along_axis(seen, ids, True, axis=1)
    rows = rows_of({"repetition_penalty": 1.3}, {"repetition_penalty": 0.7})
    got = sampling._penalise(jnp.asarray(logits), rows, jnp.asarray(seen), jnp.zeros((2, 320)))
    for i, penalty in enumerate((1.3, 0.7)):
        processor = transformers.RepetitionPenaltyLogitsProcessor(penalty)
        wanted = processor(torch.from_numpy(ids[i : i + 1]), torch.from_numpy(logits[i : i + 1]))
        np.testing.assert_allclose(np.asarray(got)[i], wanted[0].numpy(), rtol=1e-6)


def test_frequency_and_presence_penalties() -> None:
    """OpenAI: logit - count * frequency - (count > 0) * presence, over the answer alone."""
    logits = logits_of(2, 320)
    counts = np.random.default_rng(2).integers(0, 4, logits.shape)
    rows = rows_of({"frequency_penalty": 0.6}, {"frequency_penalty": -0.2, "presence_penalty": 1.1})
    seen = jnp.ones(logits.shape, bool)  # the prompt's tokens too: they are not penalised
    got = sampling._penalise(jnp.asarray(logits), rows, seen, jnp.asarray(counts))
    wanted = logits - [[0.6], [-0.2]] * counts - [[0.0], [1.1]] * (counts > 0)
    np.testing.assert_allclose(np.asarray(got), wanted, rtol=1e-5, atol=1e-5)


def draw(logits: np.ndarray, rows: SamplingRows) -> np.ndarray:
    nothing = jnp.zeros(logits.shape, jnp.int32)
    drawn = jax.jit(sampling.sample)(jnp.asarray(logits), rows, books_of(nothing))
    return np.asarray(drawn.tokens)


@pytest.mark.parametrize("vocab_size", [5, 128, 320])
def test_draws_follow_the_distribution(vocab_size: int) -> None:
    """Pearson's chi-square over 20,000 seeds; above df + 5 sqrt(2 df) once in a million."""
    many = 20_000
    logits = logits_of(1, vocab_size) / 3
    rows = rows_of(*[{}] * many, seeds=list(range(many)))
    counts = np.bincount(draw(np.repeat(logits, many, 0), rows), minlength=vocab_size)
    expected = many * np.exp(logits[0]) / np.exp(logits[0]).sum()
    chi_square = ((counts - expected) ** 2 / expected).sum()
    degrees = vocab_size - 1
    assert chi_square < degrees + 5 * np.sqrt(2 * degrees)
    assert chi_square > degrees - 5 * np.sqrt(2 * degrees)  # too good would be no chance at all


def test_temperature_sharpens_the_draw() -> None:
    many = 5000
    logits = np.repeat(logits_of(1, 320), many, 0)
    seeds = list(range(many))
    for temperature in (0.5, 2.0):
        rows = rows_of(*[{"temperature": temperature}] * many, seeds=seeds)
        share = (draw(logits, rows) == logits[0].argmax()).mean()
        scaled = np.exp(logits[0] / temperature)
        wanted = scaled.max() / scaled.sum()
        assert abs(share - wanted) < 5 * np.sqrt(wanted * (1 - wanted) / many)


def test_a_draw_depends_on_seed_and_position_alone() -> None:
    """Not on the row's place, its neighbours, or what they ask for."""
    logits = logits_of(1, 320) / 3
    alone = draw(logits, rows_of({"top_p": 0.9}, seeds=[42]))
    others = logits_of(3, 320, seed=9)
    crowd = rows_of(
        {"top_k": 3}, {"temperature": 0.0}, {"top_p": 0.9}, {"typical_p": 0.3}, seeds=[1, 2, 42, 3]
    )
    among = draw(np.concatenate([others[:2], logits, others[2:]]), crowd)
    assert among[2] == alone[0]
    many = 64
    same = np.repeat(logits, many, 0)
    assert len(set(draw(same, rows_of(*[{}] * many, seeds=list(range(many)))))) > 16
    moved = [draw(logits, rows_of({}, seeds=[42], position=p))[0] for p in range(24)]
    assert len(set(moved)) > 8


def test_both_halves_of_the_seed_count() -> None:
    logits = logits_of(1, 320) / 3
    rows = rows_of(*[{}] * 64)
    seeds = jnp.asarray([(i, 0) for i in range(64)], jnp.uint32)
    assert len(set(draw(np.repeat(logits, 64, 0), rows._replace(seeds=seeds)))) > 16


def test_greedy_rows_in_a_sampling_batch() -> None:
    logits = logits_of(4, 320)
    cold, warm = {"temperature": 0.0}, {"temperature": 5.0}
    rows = rows_of(cold, warm, cold | {"top_k": 5, "top_p": 0.1}, warm, seeds=[1, 2, 3, 4])
    drawn = draw(logits, rows)
    assert drawn[0] == logits[0].argmax()
    assert drawn[2] == logits[2].argmax()


def test_greedy_heeds_penalties() -> None:
    logits = logits_of(1, 320)
    counts = jnp.asarray(np.eye(320, dtype=np.int32)[[logits[0].argmax()]])
    rows = rows_of({"temperature": 0.0, "presence_penalty": 50.0})
    drawn = sampling.sample(jnp.asarray(logits), rows, books_of(counts))
    assert int(drawn.tokens[0]) == logits[0].argsort()[-2]


def test_logprobs_are_of_the_raw_distribution() -> None:
    logits = logits_of(2, 320)
    wishes = {"temperature": 0.3, "top_k": 5}, {"temperature": 0.0}
    rows = rows_of(*[wish | {"num_alternatives": 20} for wish in wishes])
    nothing = jnp.zeros((2, 320), jnp.int32)
    drawn = sampling.sample(jnp.asarray(logits), rows, books_of(nothing))
    raw = torch.log_softmax(torch.from_numpy(logits), -1).numpy()
    wanted = np.take_along_axis(raw, np.asarray(drawn.tokens)[:, None], 1)[:, 0]
    np.testing.assert_allclose(np.asarray(drawn.logprobs), wanted, atol=1e-5)
    top, logprobs = np.asarray(drawn.top_tokens), np.asarray(drawn.top_logprobs)
    np.testing.assert_array_equal(top, np.argsort(-logits, axis=-1)[:, :20])
    np.testing.assert_allclose(logprobs, np.take_along_axis(raw, top, 1), atol=1e-5)


@pytest.mark.parametrize(
    "num_rows", [20, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 8, 11))]
)
def test_parts_of_a_batch_keep_their_places(num_rows: int) -> None:
    """Eight rows at most at a time; 11 have no divisor but one."""
    logits = jnp.asarray(logits_of(num_rows, 320) / 3)
    rows = rows_of(*[{"num_alternatives": 5}] * num_rows, seeds=list(range(num_rows)))
    sizes = []

    def choose(part: tuple[jax.Array, SamplingRows]) -> StepOutput:
        sizes.append(part[0].shape[0])
        nothing = jnp.zeros(part[0].shape, jnp.int32)
        return StepOutput(*sampling.sample(*part, books_of(nothing)))

    for got, wanted in zip(
        in_parts(choose, (logits, rows), num_rows, 8)[:4],
        jax.jit(choose)((logits, rows))[:4],
        strict=True,
    ):
        np.testing.assert_allclose(np.asarray(got), np.asarray(wanted), atol=1e-6)
    assert max(sizes[:-1]) <= 8
