"""Decoding: the reference's sequences and scores, and what batches, buckets and stopping must not change."""

import itertools
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from bestiary import models
from bestiary.models.checkpoints.parity import check
from bestiary.train.commands.parity import describe
from bestiary.train.errors import RunError
from bestiary.train.generate import generator as generator_module
from bestiary.train.generate import scheduler
from bestiary.train.generate.config import DecodeConfig
from bestiary.train.generate.generator import Generator, Watch
from bestiary.train.generate.logits import continuations
from bestiary.train.generate.released import read_generation_config
from bestiary.train.generate.scheduler import Sizes
from bestiary.train.translate.attention_map import attention_of

FIXTURE = Path(__file__).parents[2] / "models" / "fixtures" / "marian_translation"
CASES = json.loads((FIXTURE / "generations.json").read_text())


@cache
def loaded() -> models.Loaded:
    return models.load(FIXTURE)


def sources(folder: Path = FIXTURE) -> list[list[int]]:
    inputs = load_file(folder / "expected.safetensors")
    ids, mask = inputs["input.input_ids"], inputs["input.attention_mask"]
    return [row[kept == 1].tolist() for row, kept in zip(ids, mask, strict=True)]


@cache
def generator(rows: int = 4, **named: Any) -> Generator:
    return Generator(loaded().model, loaded().params, DecodeConfig(**named), rows=rows)


def released(folder: Path, settings: dict[str, Any]) -> tuple[DecodeConfig, dict[str, int]]:
    """What is read from a folder with these settings in its generation_config.json."""
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return read_generation_config(folder)


# Seven of the ten, to save compilations; the others are of the same kinds.
@pytest.mark.parametrize("case", [CASES[i] for i in (0, 2, 3, 4, 5, 7, 9)], ids=lambda case: str(case["settings"]))
def test_sequences_and_scores_are_the_references(case: dict[str, Any], tmp_path: Path) -> None:
    settings = dict(case["settings"])
    given = settings.pop("prefix", [])
    decode, _ = released(tmp_path, settings)
    found = Generator(loaded().model, loaded().params, decode, rows=4)(sources(), [given] * 3)
    for row, expected in zip(found, case["sequences"], strict=True):
        for hypothesis, sequence in zip(row, expected, strict=True):
            body = sequence[1:]
            assert hypothesis.tokens == (body[: body.index(2)] if 2 in body else body)
    if case["scores"] is not None:
        np.testing.assert_allclose([[h.score for h in row] for row in found], case["scores"], atol=1e-5)


def small_sizes(monkeypatch: pytest.MonkeyPatch, **more: int) -> None:
    """Fewer slots than are needed, so that they must become more, and lengths that differ."""
    sizes = {"FIRST_SLOTS": 4, "FIRST_STEPS": 2, "SLOTS_PER_TOKEN": 0, "FEWEST_ROWS": 2, "FEWEST_TOKENS": 4}
    for name, value in (sizes | more).items():
        monkeypatch.setattr(Sizes, name, value)


def counted(owner: Any, name: str, monkeypatch: pytest.MonkeyPatch | None = None) -> list[None]:
    """A list that becomes longer with each call of the owner's function."""
    calls, function = list[None](), getattr(owner, name)

    def call(*arguments: Any) -> Any:
        calls.append(None)
        return function(*arguments)

    (monkeypatch.setattr if monkeypatch else setattr)(owner, name, call)
    return calls


def test_a_cache_that_grows_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    small_sizes(monkeypatch, FIRST_SLOTS=8)
    generate = Generator(loaded().model, loaded().params, DecodeConfig(beam=4, max_length=10), rows=2)
    widened = counted(generate.programs, "widen")
    found = generate(sources())
    assert widened
    assert [h.tokens for (h,) in found] == [row[0][1 : row[0].index(2)] for row in CASES[0]["sequences"]]
    np.testing.assert_allclose([[h.score for h in row] for row in found], CASES[0]["scores"], atol=1e-5)


def test_the_shared_fixture(shared: Path) -> None:
    folder = shared / "parity" / "marian_translation"
    report = check(folder)
    assert report.passed, "\n".join(describe(report))
    expected = load_file(folder / "expected.safetensors")
    settings = json.loads((folder / "generate.json").read_text())
    assert settings["early_stopping"] is False
    config = DecodeConfig(
        beam=settings["num_beams"],
        max_length=settings["max_new_tokens"],
        length_penalty=settings["length_penalty"],
    )
    model = models.load(folder)
    found = Generator(model.model, model.params, config)(sources(folder))
    for (hypothesis,), sequence in zip(found, expected["generate.sequences"].tolist(), strict=True):
        assert [0, *hypothesis.tokens, 2] == sequence
    np.testing.assert_allclose([row[0].score for row in found], expected["generate.scores"], atol=1e-5)


def test_attention_is_drawn_of_a_model_whose_logits_have_a_bias() -> None:
    params = {**loaded().params, "final_logits_bias": np.ones_like(loaded().params["final_logits_bias"])}
    source = sources()[0]
    model = loaded().model
    maps = attention_of(model, model.incremental().prepare(params), source, [5, 6, 7])
    assert maps.shape[2:] == (3, len(source))
    np.testing.assert_allclose(maps.sum(-1), 1, atol=1e-5)


# A model that knows its last token alone, small enough to search by hand.

WORDS, END = 6, 1


@dataclass(frozen=True)
class Chain:
    """Logits from a table [V, V] of the last token; attention from another, [V, S]."""

    vocabulary: int = WORDS
    positions: int | None = 32
    start_id: int | None = 0
    eos_id: int = END
    forced_eos_id: int | None = None
    forced_bos_id: int | None = None

    def incremental(self) -> "Chain":
        return self

    def prepare(self, params: Any) -> Any:
        return params

    def start(self, prepared: Any, input_ids: Any, segment_ids: Any) -> Any:
        return segment_ids

    def cache(self, rows: int, slots: int) -> Any:
        return jnp.zeros(rows)

    def step(self, prepared: Any, memory: Any, cache: Any, tokens: Any, positions: Any, places: Any, mask: Any) -> Any:
        return prepared["logits"][tokens], cache, (prepared["attention"][tokens][:, None, :, : memory.shape[1]],)


def chain() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(5)
    attention = draw.random((WORDS, 32)).astype(np.float32)
    attention[:, 3:] = 0
    logits = draw.normal(size=(WORDS, WORDS)).astype(np.float32)
    return {"logits": logits, "attention": attention / attention.sum(1, keepdims=True)}


def of_chain(**named: Any) -> Generator:
    return Generator(Chain(), chain(), DecodeConfig(**named), rows=4)


def log_probabilities() -> np.ndarray:
    logits = chain()["logits"].astype(np.float64)
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def test_batches_and_order_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """In any order, many or one; and once all sizes were met, nothing more is compiled."""
    small_sizes(monkeypatch, FEWEST_ROWS=1)
    generate = of_chain(beam=2, max_length=12, n_best=2, early_stopping="exhaustive")
    draw = np.random.default_rng(0)
    texts = [[2] * n for n in range(1, 10)]
    prefixes = [draw.integers(2, WORDS, 1 + n % 3).tolist() for n in range(9)]
    found = generate(texts, prefixes)
    assert len({len(h.tokens) for row in found for h in row}) > 3
    for _ in range(10):
        order = draw.permutation(9)
        assert generate([texts[i] for i in order], [prefixes[i] for i in order]) == [found[i] for i in order]
    assert generate(texts[:1], prefixes[:1]) == found[:1]
    compiled = []
    for _ in range(30):
        others = [draw.integers(2, WORDS, n).tolist() for n in draw.integers(1, 16, 9)]
        generate(others, [prefixes[i] for i in draw.permutation(9)])
        compiled.append(generate.compilations)
    assert compiled[10:] == compiled[10:11] * 20


# A model whose words depend on what stands in its slots, on positions and on the source.


@dataclass(frozen=True)
class Rememberer(Chain):
    def start(self, prepared: Any, input_ids: Any, segment_ids: Any) -> Any:
        return (prepared["words"][input_ids] * segment_ids[..., None].astype(jnp.float32)).sum(axis=1)

    def cache(self, rows: int, slots: int) -> Any:
        return jnp.zeros((rows, slots, 8))

    def step(self, prepared: Any, memory: Any, cache: Any, tokens: Any, positions: Any, places: Any, mask: Any) -> Any:
        new = prepared["words"][tokens] * prepared["places"][positions][:, None]
        cache = cache.at[jnp.arange(len(tokens))[:, None], places].set(new, mode="drop")
        share = mask.astype(jnp.float32)
        past = jnp.einsum("rks,rsd->rkd", share / share.sum(axis=-1, keepdims=True), cache)
        hidden = jnp.tanh(new + 3 * past + memory[:, None])
        return (
            hidden @ prepared["words"].T + prepared["often"],
            cache,
            (jnp.ones((*tokens.shape[:1], 1, tokens.shape[1], 1)),),
        )


@pytest.mark.parametrize(
    ("cores", "named"),
    [
        (1, {}),
        (1, {"beam": 3, "early_stopping": "exhaustive"}),
        (3, {"beam": 4, "diverse_groups": 2, "no_repeat_ngram": 2}),
        (3, {"sample": True, "n_best": 2}),
    ],
)
def test_many_sentences_at_many_ages_are_as_one_alone(
    cores: int, named: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slots that become more, sentences that start again in a smaller batch, rows that are refilled, and threads."""
    draw = np.random.default_rng(2)
    params = {name: draw.normal(size=(count, 8)).astype(np.float32) for name, count in (("words", 6), ("places", 32))}
    params["often"] = 2 * np.eye(WORDS, dtype=np.float32)[None, None, END]
    texts = [draw.integers(0, WORDS, n).tolist() for n in draw.integers(1, 17, 60)]
    prefixes = [draw.integers(2, WORDS, n).tolist() for n in draw.integers(0, 4, 60)]
    config = DecodeConfig(max_length=28, **named)
    alone = Generator(Rememberer(), params, config, rows=1)
    expected = [
        alone([text], [prefix], first=i)[0] for i, (text, prefix) in enumerate(zip(texts, prefixes, strict=True))
    ]
    assert len({len(row[0].tokens) for row in expected}) > 8
    usual = Sizes.POSTPONABLE
    small_sizes(monkeypatch, FEWEST_ROWS=1, POSTPONABLE=4)
    monkeypatch.setattr(Generator, "ROWS_PER_THREAD", 4)
    monkeypatch.setattr(generator_module, "usable_cores", lambda: cores)
    generate = Generator(Rememberer(), params, config, rows=12)
    widened, left = counted(generate.programs, "widen"), counted(scheduler.Batch, "_abandon", monkeypatch)
    found = generate(texts, prefixes)
    assert widened
    assert left or config.width == 1  # these all need more slots, together
    assert [[h.tokens for h in row] for row in found] == [[h.tokens for h in row] for row in expected]
    for row, other in zip(found, expected, strict=True):
        np.testing.assert_allclose([h.score for h in row], [h.score for h in other], rtol=1e-5)
    monkeypatch.setattr(Sizes, "POSTPONABLE", usual)  # those that lack slots are too many
    widened.clear()
    left.clear()
    again = generate(texts, prefixes)
    assert widened
    assert not left
    assert [[h.tokens for h in row] for row in again] == [[h.tokens for h in row] for row in expected]


@dataclass(frozen=True)
class Unconditional(Rememberer):
    """The same, of an empty source."""

    def start(self, prepared: Any, input_ids: Any, segment_ids: Any) -> Any:
        return jnp.zeros((len(input_ids), 8))


@dataclass(frozen=True)
class Decoder(Unconditional):
    """The same without an encoder: it starts from the first token of its prompt, and has no limit."""

    positions: int | None = None
    start_id: int | None = None

    def start(self, prepared: Any, input_ids: Any, segment_ids: Any) -> Any:
        places = prepared["places"][: input_ids.shape[1]]
        read = (prepared["words"][input_ids] * places[None] * segment_ids[..., None].astype(jnp.float32)).sum(axis=1)
        return read, segment_ids.sum(axis=1)

    def step(self, prepared: Any, memory: Any, cache: Any, tokens: Any, positions: Any, places: Any, mask: Any) -> Any:
        read, count = memory
        new = prepared["words"][tokens] * prepared["places"][positions + count][:, None]
        cache = cache.at[jnp.arange(len(tokens))[:, None], places].set(new, mode="drop")
        seen = mask.astype(jnp.float32)
        past = jnp.einsum("rks,rsd->rkd", seen, cache) + read[:, None]
        hidden = jnp.tanh(new + 3 * past / (seen.sum(axis=-1) + count[:, None].astype(jnp.float32))[..., None])
        return hidden @ prepared["words"].T + prepared["often"], cache, ()


def rememberer_params() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(2)
    params = {name: draw.normal(size=(count, 8)).astype(np.float32) for name, count in (("words", 6), ("places", 64))}
    return params | {"often": np.zeros((1, 1, WORDS), np.float32)}


def continued(prompt: list[int], count: int) -> list[int]:
    """The most probable tokens after a prompt, from all tokens at a time."""
    params, tokens = rememberer_params(), list(prompt)
    while len(tokens) < len(prompt) + count:
        cache = params["words"][tokens] * params["places"][: len(tokens)]
        hidden = np.tanh(cache[-1] + 3 * cache.mean(axis=0))
        tokens.append(int((hidden @ params["words"].T).argmax()))
        if tokens[-1] == END:
            return tokens[len(prompt) : -1]
    return tokens[len(prompt) :]


def test_a_decoder_continues_its_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As an encoder-decoder whose memory says nothing, given the prompt as start token and prefix.

    Of several lengths; that rows and slots change in between is tested with who watches.
    """
    small_sizes(monkeypatch, FEWEST_ROWS=4, FIRST_SLOTS=32)
    draw = np.random.default_rng(4)
    prompts = [[0, *draw.integers(2, WORDS, n).tolist()] for n in (5, 0, 3, 7, 1, 6)]
    greedy = Generator(Decoder(), rememberer_params(), DecodeConfig(max_length=6), rows=4)
    assert [h.tokens for (h,) in greedy(prompts)] == [continued(prompt, 6) for prompt in prompts]
    config = DecodeConfig(max_length=6, sample=True, n_best=3, seed=1)
    sample = Generator(Decoder(), rememberer_params(), config, rows=4)
    alone = [sample([prompt], first=number)[0] for number, prompt in enumerate(prompts)]
    assert [[h.tokens for h in row] for row in sample(prompts)] == [[h.tokens for h in row] for row in alone]
    for named in ({"beam": 4, "n_best": 2, "no_repeat_ngram": 3}, {"beam": 2, "repetition_penalty": 1.2}):
        config = DecodeConfig(max_length=6, **named)
        found = Generator(Decoder(), rememberer_params(), config, rows=4)(prompts)
        expected = Generator(Unconditional(), rememberer_params(), config, rows=4)(
            [[2]] * len(prompts), [prompt[1:] for prompt in prompts]
        )
        for number, (row, other) in enumerate(zip(found, expected, strict=True)):
            prefix = prompts[number][1:]
            assert [[*prefix, *h.tokens] for h in row] == [h.tokens for h in other]
            np.testing.assert_allclose([h.score for h in row], [h.score for h in other], rtol=1e-5)
    assert greedy([]) == []
    with pytest.raises(RunError, match="source 1: expected at least 1 token"):
        greedy([[2], []])
    with pytest.raises(RunError, match="no source"):
        Generator(Decoder(), chain(), DecodeConfig(beam=2, max_length=9, coverage_penalty=0.1), rows=4)


def test_an_error_in_a_thread_ends_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    small_sizes(monkeypatch)
    monkeypatch.setattr(Generator, "ROWS_PER_THREAD", 1)
    monkeypatch.setattr(generator_module, "usable_cores", lambda: 2)
    generate = of_chain(beam=2, max_length=5)
    searched = []

    def search(batch: Any) -> list[int]:
        searched.append(batch)
        if len(searched) == 1:
            raise MemoryError("no room")
        assert batch._request.cancelled.wait(timeout=60)
        return []

    monkeypatch.setattr(scheduler.Batch, "search", search)
    with pytest.raises(MemoryError, match="no room"):
        generate([[2] * n for n in range(1, 33)])
    assert len(searched) <= 2  # of two threads, which have four lengths each


def test_nothing_is_left_to_say() -> None:
    (found,) = of_chain(beam=2, max_length=5, suppressed=tuple(range(WORDS)))([[2]])
    assert found == [([], -np.inf)]


def test_penalties_by_their_formulas() -> None:
    """A beam that holds everything finds the best of all outputs under Wu et al.'s equation 14."""
    log_p, attention = log_probabilities(), chain()["attention"][:, :3]
    scored = []
    for length in range(1, 5):
        for words in itertools.product(range(WORDS), repeat=length):
            if END in words[:-1] or (words[-1] != END and length < 4):
                continue
            path = (0, *words)
            total = sum(log_p[a, b] for a, b in itertools.pairwise(path))
            coverage = np.log(np.minimum(attention[list(path[:-1])].sum(0), 1)).sum()
            text = [word for word in words if word != END]
            scored.append((total / ((5 + length) / 6) ** 0.8 + 0.3 * coverage, text))
    scored.sort(key=lambda pair: -pair[0])
    (found,) = of_chain(
        beam=300, max_length=4, length_penalty=0.8, length_penalty_form="gnmt", coverage_penalty=0.3, n_best=5,
        early_stopping="exhaustive",
    )([[2, 3, 4]])  # fmt: skip
    assert [h.tokens for h in found] == [text for _, text in scored[:5]]
    np.testing.assert_allclose([h.score for h in found], [score for score, _ in scored[:5]], rtol=1e-5)


def test_groups_avoid_what_those_before_chose() -> None:
    log_p = log_probabilities()
    log_p[:, END] = -np.inf
    penalty, groups, length = 0.9, 3, 4
    paths, totals = [[0] for _ in range(groups)], [0.0] * groups
    for _ in range(length):
        chosen: list[int] = []
        for group in range(groups):
            gains = log_p[paths[group][-1]] - penalty * np.bincount(chosen, minlength=WORDS)
            chosen.append(int(gains.argmax()))
            totals[group] += gains.max()
            paths[group].append(chosen[-1])
    (found,) = of_chain(
        beam=3, diverse_groups=3, diversity_penalty=penalty, max_length=length, suppressed=(END,), n_best=3
    )([[2]])
    expected = sorted(zip(totals, paths, strict=True), key=lambda pair: -pair[0])
    assert len({tuple(path) for _, path in expected}) == 3
    assert [h.tokens for h in found] == [path[1:] for _, path in expected]
    np.testing.assert_allclose([h.score for h in found], [total / length for total, _ in expected], rtol=1e-5)


def test_prefixes_are_kept_and_not_scored() -> None:
    prefixes = [[4, 5, 4], [], [3], [2, 2]]
    found = of_chain(beam=2, max_length=5)([[2]] * 4, prefixes)
    for prefix, (hypothesis,) in zip(prefixes, found, strict=True):
        assert hypothesis.tokens[: len(prefix)] == prefix
        path = [0, *hypothesis.tokens]
        path += [END] if len(path) - 1 - len(prefix) < 5 else []
        gained = [log_probabilities()[a, b] for a, b in itertools.pairwise(path[len(prefix) :])]
        np.testing.assert_allclose(hypothesis.score, sum(gained) / len(gained), rtol=1e-5)


def test_sampling_draws_by_the_models_probabilities() -> None:
    drawn = of_chain(sample=True, n_best=1000, max_length=1, temperature=2.0, seed=1)
    found = drawn([[2]] * 4)
    tokens = [h.tokens[0] if h.tokens else END for row in found for h in row]
    weights = np.exp(chain()["logits"][0] / 2)
    np.testing.assert_allclose(np.bincount(tokens, minlength=WORDS) / 4000, weights / weights.sum(), atol=0.03)
    # A sentence's draws are its own: the same alone, others for another sentence.
    assert drawn([[2]]) == found[:1]
    assert found[1] != found[0]


def test_nucleus_and_best_words_bound_what_is_drawn() -> None:
    shares = np.exp(log_probabilities()[0])
    order = np.argsort(-shares)
    nucleus = order[: 1 + int((shares[order].cumsum() < 0.6).sum())]
    assert 1 < len(nucleus) < WORDS
    for named, allowed in (({"top_p": 0.6}, nucleus), ({"top_k": 2}, order[:2])):
        (found,) = of_chain(sample=True, n_best=300, max_length=1, **named)([[2]])
        assert {h.tokens[0] if h.tokens else END for h in found} == set(allowed.tolist())


@pytest.mark.parametrize("words", [7, 1003, 1024])
def test_continuations_are_the_largest(words: int) -> None:
    draw = np.random.default_rng(0)
    gains = draw.permutation(2 * 3 * words).reshape(2, 3, words).astype(np.float32)
    norm, scores = draw.permutation(6).reshape(2, 3) * np.float32(40), draw.permutation(6).reshape(2, 3) * np.float32(9)
    found = jax.jit(continuations, static_argnums=3)(gains, norm, scores, 7)
    every = (gains - norm[..., None] + scores[..., None]).reshape(2, -1)
    order = np.argsort(-every, axis=-1, kind="stable")[:, :7]
    largest = np.take_along_axis(every, order, 1)
    for array, expected in zip(found, (largest, order // words, order % words), strict=True):
        np.testing.assert_array_equal(array, expected)


def test_other_parameters_take_the_same_programs() -> None:
    first = of_chain(max_length=3)
    found = first([[2]])
    other = chain()
    other["logits"] = -other["logits"]
    second = first.with_params(other)
    assert second([[2]]) != found
    assert second.compilations == first.compilations == 2
    assert first([[2]]) == found


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"beam": 0}, "beam: expected at least 1, found 0"),
        ({"beam": 2, "n_best": 3}, "n_best: expected at most beam 2"),
        ({"beam": 4, "sample": True}, "beam must be 1"),
        ({"beam": 4, "diverse_groups": 3}, "divisor of beam 4"),
        ({"top_k": 5}, "they need sample"),
        ({"sample": True, "top_p": 0.0}, "top_p: expected"),
        ({"min_length": 128}, "min_length: expected less than max_length 128"),
    ],
)
def test_nonsense_is_refused(named: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DecodeConfig(**named)


def test_a_checkpoints_own_settings(tmp_path: Path) -> None:
    opus = {
        "num_beams": 6, "max_length": 512, "bad_words_ids": [[58100]], "renormalize_logits": True,
        "decoder_start_token_id": 58100, "eos_token_id": 0, "forced_eos_token_id": 0, "pad_token_id": 58100,
    }  # fmt: skip
    decode, special = released(tmp_path, opus)
    assert decode == DecodeConfig(beam=6, max_length=511, suppressed=(58100,), renormalise=True)
    assert special == {"decoder_start_token_id": 58100, "eos_token_id": 0, "forced_eos_token_id": 0}
    assert released(tmp_path, {})[0] == DecodeConfig(max_length=19)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"do_sample": True, "penalty_alpha": 0.6}, "do_sample: true\n  penalty_alpha: 0.6"),
        ({"bad_words_ids": [[1], [2, 3]]}, "bad_words_ids"),
        ({"eos_token_id": [1, 2]}, "eos_token_id"),
        ({"early_stopping": "later"}, "later"),
        ({"num_beams": "four"}, 'num_beams: expected a whole number, found "four"'),
        ({"num_beams": 4.5}, "num_beams: expected a whole number, found 4.5"),
        ({"num_beams": 0}, "beam: expected at least 1"),
        ({"num_beams": 10**6}, "beam: expected at most 1,024, found 1,000,000"),
        ({"length_penalty": 3e7}, "length_penalty: expected a number from -10 to 10, found 3e"),
        ({"suppress_tokens": 5}, "suppress_tokens: expected a list, each item a whole number"),
        ({"bad_words_ids": [5]}, "bad_words_ids: expected a list"),
        ({"renormalize_logits": 1}, "renormalize_logits: expected true or false"),
        ({"eos_token_id": "2"}, "eos_token_id: expected a whole number"),
        ({"length_penalty": True}, "length_penalty: expected a number"),
    ],
)
def test_settings_that_are_not_followed_are_named(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        released(tmp_path, settings)


def test_what_does_not_fit_the_model_is_refused() -> None:
    with pytest.raises(ValueError, match="max_length 33: the model has 32 positions"):
        of_chain(max_length=33)
    with pytest.raises(ValueError, match=r"suppressed: expected tokens from 0 to 5, found \(6,\)"):
        of_chain(max_length=3, suppressed=(6,))
    generate = of_chain(max_length=30)
    assert generate([]) == []
    with pytest.raises(ValueError, match="source 1: expected 1 to 32 tokens, found 0"):
        generate([[2], []])
    with pytest.raises(ValueError, match="prefix 0: 3 tokens and max_length 30 more do not fit"):
        generate([[2]], [[2, 2, 2]])
    with pytest.raises(ValueError, match="1 sources, but 2 prefixes"):
        generate([[2]], [[], []])


def test_who_watches_sees_every_token_once_and_can_end_an_output(monkeypatch: pytest.MonkeyPatch) -> None:
    small_sizes(monkeypatch, FEWEST_ROWS=1)
    draw = np.random.default_rng(4)
    prompts = [[0, *draw.integers(2, WORDS, n).tolist()] for n in draw.integers(0, 12, 9)]
    generate = Generator(Decoder(), rememberer_params(), DecodeConfig(max_length=9), rows=4)
    whole = generate(prompts)
    assert [h.tokens for (h,) in whole] == [continued(prompt, 9) for prompt in prompts]
    for every in (1, 4):
        seen: dict[int, list[int]] = {number: [] for number in range(9)}
        finished: list[int] = []

        def watch(number: int, tokens: list[int], ended: bool, seen=seen, finished=finished) -> bool:
            assert number not in finished
            seen[number] += tokens
            if ended:
                finished.append(number)
            return False

        assert generate(prompts, watch=Watch(watch, every)) == whole
        assert [seen[number] for number in range(9)] == [row[0].tokens for row in whole]
        assert sorted(finished) == list(range(9))
    ended = generate(prompts, watch=Watch(lambda number, tokens, _: number % 2 == 0, 3))
    for number, (row, other) in enumerate(zip(ended, whole, strict=True)):
        if number % 2 or len(other[0].tokens) < 3:
            assert row == other
        else:
            assert row[0].tokens == other[0].tokens[:3]
    with pytest.raises(RunError, match="cannot be followed"):
        Generator(Decoder(), rememberer_params(), DecodeConfig(beam=2, max_length=9))(
            prompts, watch=Watch(lambda *_: False, 1)
        )
