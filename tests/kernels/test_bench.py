"""The benches: what they count, what they refuse, and what they leave behind."""

import dataclasses
import json
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bestiary.kernels.bench import jobs, report
from bestiary.kernels.bench import layers as layers_bench
from bestiary.kernels.bench import peers as bench_peers
from bestiary.kernels.bench import timing as bench_timing
from bestiary.kernels.bench.cases import (
    CORPORA,
    BenchError,
    Case,
    abstract,
    documents,
    draw,
    needed_area,
    needed_work,
    pack,
    parse_shapes,
    parse_window,
)
from bestiary.train import cli

CASE = Case(2, 6, 6, 4, 2, 8, "float32")


def test_shapes():
    assert parse_shapes("2x128x4x64, 1x5x7x4x2x32") == [(2, 128, 128, 4, 4, 64), (1, 5, 7, 4, 2, 32)]


@pytest.mark.parametrize(
    "text", ["", "2x128x4", "2x128x4x64x1", "2x0x4x64", "2xlongx4x64", "1x5x7x4x3x32", "2x8x4x64,"]
)
def test_shapes_that_do_not_fit(text):
    with pytest.raises(BenchError, match=r"--shapes: expected BxLxHxD .*found '"):
        parse_shapes(text)


@pytest.mark.parametrize(
    ("change", "ids", "area"),
    [
        ({}, None, 2 * 36),
        ({"causal": True}, None, 2 * 21),
        ({"causal": True, "keys": 4}, None, 2 * (1 + 2 + 3 + 4 + 4 + 4)),
        ({}, [[1, 1, 1, 2, 0, 0], [1, 2, 2, 2, 2, 2]], 9 + 1 + 1 + 25),
        ({"causal": True}, [[1, 1, 1, 2, 0, 0], [0, 0, 0, 0, 0, 0]], 6 + 1),
        ({"window": (1, 0)}, None, 2 * (1 + 5 * 2)),
        ({"window": (None, 1)}, None, 2 * (2 + 3 + 4 + 5 + 6 + 6)),
        ({"window": (1, 2), "causal": True, "keys": 4}, None, 2 * (1 + 3 * 2 + 1)),
        ({"window": (1, 0)}, [[1, 1, 1, 2, 0, 0], [0, 0, 0, 0, 0, 0]], 1 + 2 + 2 + 1),
    ],
)
def test_needed_area_is_the_pairs_that_attend(change, ids, area):
    case = dataclasses.replace(CASE, **change)
    assert needed_area(case, None if ids is None else np.array(ids, np.int32)) == area


@pytest.mark.parametrize(
    ("text", "window"), [("", (None, None)), ("7", (7, 7)), ("7,", (7, None)), (",0", (None, 0)), ("3, 4", (3, 4))]
)
def test_window(text, window):
    assert parse_window(text) == window


def test_needed_work_by_hand():
    forward, backward = needed_work(dataclasses.replace(CASE, dtype="bfloat16"), area=72)
    assert forward.operations == 2 * 2 * 72 * 4 * 8
    assert backward.operations == 2.5 * forward.operations
    # query and output, key and value, lse
    assert forward.bytes == 2 * (2 * 6 * 4 * 8) * 2 + 2 * (2 * 6 * 2 * 8) * 2 + 4 * 2 * 6 * 4
    # query, output, two gradients; key, value, two gradients; lse
    assert backward.bytes == 4 * (2 * 6 * 4 * 8) * 2 + 4 * (2 * 6 * 2 * 8) * 2 + 4 * 2 * 6 * 4


@pytest.mark.parametrize(("corpus", "length", "share"), [("wikipedia", 4096, 0.097), ("short", 2048, 0.112)])
def test_packed_rows(corpus, length, share):
    """Whole documents, contiguous, each of its own id; the mean length and the needed share are as published."""
    ids = pack(CORPORA[corpus], 64, length, seed=0)
    assert (ids == pack(CORPORA[corpus], 64, length, seed=0)).all()
    assert (ids != 0).mean() > 0.98
    steps = np.diff(ids, axis=1)
    assert (((steps == 0) | (steps == 1)) | (ids[:, 1:] == 0)).all()
    documents = sum(row.max() for row in ids)
    assert (ids != 0).sum() / documents == pytest.approx(CORPORA[corpus].mean, rel=0.08)
    case = Case(64, length, length, 1, 1, 8, "float32")
    assert needed_area(case, ids) / (64 * length**2) == pytest.approx(share, rel=0.1)


def test_a_sample_is_divided_by_its_calls(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(bench_timing.time, "perf_counter", lambda: float(next(clock)))
    started = []
    seconds = bench_timing.sampled(lambda: started.append(1), lambda _: None, 4, samples=3, least_seconds=5.0)
    # The trial takes one second, so five programs of four calls make a sample, which this clock gives one second.
    assert len(started) == 2 + 3 * 5
    assert seconds == (1 / 20, 1 / 20, 1 / 20)


def test_calls_of_a_program_wait_for_each_other():
    program = bench_timing.one_after_the_other(lambda x, y: x @ y)
    pairs = [(jnp.full((4, 4), float(n)), jnp.eye(4)) for n in range(3)]
    text = jax.jit(program).lower(pairs).as_text()
    assert text.count("optimization_barrier") == 2
    assert [float(x[0, 0]) for x in jax.jit(program)(pairs)] == [0.0, 1.0, 2.0]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """One run of the command, at small shapes, with what a CPU has."""
    out = tmp_path_factory.mktemp("bench")
    arguments = ["--shapes", "2x64x2x32", "--bias", "relative", "--packed", "short", "--peers", "jax.nn,splash"]
    status = cli.main(
        ["bench", "attention", *arguments, "--samples", "2", "--sample-seconds", "0.001", "--out", str(out)]
    )
    assert status == 0
    return out


def test_the_files_of_a_run(measured):
    assert sorted(path.name for path in measured.iterdir()) == [
        f"attention-cpu-short.{e}" for e in ("json", "md", "png")
    ]
    result = json.loads((measured / "attention-cpu-short.json").read_text())
    assert result["command"].startswith("bestiary bench attention --shapes 2x64x2x32 --bias relative --packed short")
    assert result["versions"]["jax"] == jax.__version__
    assert len(result["date"]) == 10
    assert result["ceilings"]["matmul_tflops"] > 0
    (case,) = result["cases"]
    entries = {entry["name"]: entry for entry in case["contestants"]}
    for name in ("bestiary xla", "jax.nn xla"):
        entry = entries[name]
        assert set(entry["errors"]) == {"output", "query", "key", "value", "bias"}
        assert max(entry["errors"].values()) < 2e-3
        for which in ("forward", "backward"):
            part, needed = entry[which], case["needed"][which]
            assert 0 < part["shortest"] <= part["median"] <= part["longest"]
            assert part["tflops"] == pytest.approx(needed["operations"] / part["median"] / 1e12)
    assert entries["jax.nn cudnn"]["reason"] == "needs an NVIDIA GPU"
    assert entries["splash attention"]["reason"] == "needs a TPU"
    assert not any(entry.get("failed") for entry in case["contestants"])
    assert "jax.nn xla" in (measured / "attention-cpu-short.md").read_text()
    assert (measured / "attention-cpu-short.png").read_bytes().startswith(b"\x89PNG")


def test_a_contestant_that_differs_is_not_timed(monkeypatch):
    def wrong(case, inputs):
        return bench_peers.jax_nn("xla", case, inputs) * 1.1

    monkeypatch.setitem(bench_peers.PEERS, "wrong", wrong)

    def broken(case, inputs):
        return jnp.reshape(inputs.query, (1, 2, 3))

    monkeypatch.setitem(bench_peers.PEERS, "broken", broken)
    monkeypatch.setattr(bench_peers.JaxRunner, "forward", lambda self: bench_timing.Seconds(1.0, 1.0, 1.0))
    monkeypatch.setattr(bench_peers.JaxRunner, "backward", lambda self: bench_timing.Seconds(1.0, 1.0, 1.0))
    job = {"case": dataclasses.asdict(CASE), "sets": 1, "seed": 0, "timing": {"samples": 1, "least_seconds": 0.0}}
    ours, wrong_answer = (jobs.contest(job | {"name": name}) for name in ("bestiary xla", "wrong"))
    assert "backward" in ours
    assert "forward" not in wrong_answer
    assert wrong_answer["wrong"]
    assert wrong_answer["reason"].endswith("differs from XLA in float32 by 0.1: not timed")
    with pytest.raises(TypeError, match="reshape"):
        jobs.contest(job | {"name": "broken"})
    # That ours is wrong is found too: the truth is not ours.
    monkeypatch.setattr(bench_peers, "ours", lambda name, case, inputs: wrong(case, inputs))
    assert jobs.contest(job | {"name": "bestiary xla"})["wrong"]


def test_an_answer_that_never_came_is_listed_with_the_reason():
    case = report.described(CASE, 0)
    assert report.entered(case, "torch flex", {"failed": "no answer within 300 s", "seconds": 300.0}, None) == {
        "name": "torch flex",
        "failed": True,
        "reason": "no answer within 300 s",
    }
    seconds = dict(zip(("median", "shortest", "longest"), (2.0, 1.0, 3.0), strict=True))
    entry = report.entered(case, "x", {"forward": seconds, "backward": seconds, "errors": {}}, None)
    assert entry["forward"]["share_of_ceiling"] is None
    result = {
        "device": "a chip", "dtype": "float32", "date": "2026-12-01", "command": "x", "versions": {"jax": "0"},
        "ceilings": None, "cases": [case | {"contestants": [entry]}],
    }  # fmt: skip
    assert "The ceilings were not measured." in report.markdown(result)
    assert report.chart(result).startswith(b"\x89PNG")


def test_documents_in_the_forms_of_other_implementations():
    ids = np.array([[1, 1, 2, 2, 2, 0], [3, 3, 3, 3, 3, 3], [0, 0, 0, 0, 0, 0]], np.int32)
    found = documents(ids)
    assert found.starts.tolist() == [[0, 2, -1], [0, -1, -1], [-1, -1, -1]]
    assert found.lengths.tolist() == [[2, 3, -1], [6, -1, -1], [-1, -1, -1]]
    assert found.first.tolist() == [[0, 0, 2, 2, 2, 5], [0] * 6, [0] * 6]
    assert found.stop.tolist() == [[2, 2, 5, 5, 5, 6], [6] * 6, [6] * 6]
    packed = pack(CORPORA["short"], 4, 512, seed=1)
    found = documents(packed)
    place = np.arange(512)
    seen = (place[None, None] >= found.first[..., None]) & (place[None, None] < found.stop[..., None])
    assert (seen == (packed[:, :, None] == packed[:, None, :])).all()
    assert found.lengths[found.lengths > 0].sum() == (packed != 0).sum()


@pytest.mark.parametrize(
    "rows",
    [[[1, 1, 2, 2, 2, 0], [3, 3, 3, 3, 3, 3], [0, 0, 0, 0, 0, 0], [1, 2, 3, 3, 0, 0]], [[1, 1, 1, 0], [1, 1, 0, 0]]],
)
def test_packed_rows_as_cudnn_takes_them(rows):
    """Through jax's own reading of them: each document's first number in the flat array, and its length in tokens."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    ids = np.array(rows, np.int32)
    offsets, lengths = map(jnp.asarray, bench_peers.cudnn_packing(ids))
    array = jnp.zeros((*ids.shape, 2, 8))
    found, _, places, _ = fused._fix_seqlen_offsets(lengths, lengths, offsets, offsets, array, array)
    documents_of = [(row * ids.shape[1] + start, length) for row, line in enumerate(rows)
                    for start, length in runs(line)]  # fmt: skip
    count = len(documents_of)
    assert found.reshape(-1).tolist() == [length for _, length in documents_of] + [0] * (found.size - count)
    assert places.reshape(-1).tolist()[:count] == [place * 16 for place, _ in documents_of]
    assert set(places.reshape(-1).tolist()[count:]) == {ids.size * 16}


def runs(line: list[int]) -> list[tuple[int, int]]:
    """First token and length of each document of a row."""
    return [(line.index(n), line.count(n)) for n in dict.fromkeys(line) if n]


@pytest.mark.parametrize("change", [{}, {"bias": "dense", "packed": "short"}, {"bias": "alibi"}, {"bias": "relative"}])
def test_shapes_without_arrays_are_those_of_the_arrays(change):
    case = dataclasses.replace(CASE, **change)
    expected = jax.eval_shape(lambda: draw(case, 1, seed=0)[0])
    assert jax.tree.map(lambda x: (x.shape, x.dtype), abstract(case)) == jax.tree.map(
        lambda x: (x.shape, x.dtype), expected
    )


def test_the_share_of_the_ceiling_is_of_the_longer_time():
    ceilings = bench_timing.Ceilings(operations=100.0, bytes=10.0)
    assert ceilings.seconds(200.0, 1.0) == 2.0
    assert ceilings.seconds(200.0, 50.0) == 5.0
    part = report.rated(bench_timing.Seconds(4.0, 3.0, 5.0), operations=2e12, at_the_ceiling=2.0)
    assert part["share_of_ceiling"] == 0.5
    assert part["tflops"] == 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "2x128"], "--shapes: expected BxLxHxD"),
        (["--shapes", "1x8x9x2x2x16", "--packed", "short"], "packed rows attend to themselves, found 1x8 queries x 9"),
        (["--bias", "none,rotary"], "--bias: expected some of none, relative, alibi, dense, found 'rotary'"),
        (["--packed", "wiki"], "--packed: expected one of wikipedia, short, found 'wiki'"),
        (["--peers", "flash"], "--peers: expected some of all, none, jax.nn"),
        (["--window", "3,x"], "--window: expected LEFT,RIGHT"),
        (["--limit", "0"], "--limit: expected seconds above 0, found 0"),
        (["--dropout", "1.5"], "--dropout: expected a rate in [0, 1), found 1.5"),
        (["--chip", "h200"], "--chip: only with --tune"),
        (["--tune"], "--tune: no accelerator found; name a chip to compile for, --chip h100|h200|v4"),
        (["--tune", "--chip", "abacus"], "--tune: there are no kernels for 'abacus'; known chips: h100, h200"),
    ],
)
def test_bad_arguments(arguments, message, capsys, tmp_path):
    assert cli.main(["bench", "attention", *arguments, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_inputs_differ_between_sets_and_padding_has_no_gradient():
    first, second = draw(Case(1, 64, 64, 2, 2, 8, "float32", "dense", packed="short"), 2, seed=0)
    assert not np.array_equal(first.query, second.query)
    assert first.parameter.shape == (1, 2, 64, 64)
    padding = np.asarray(first.segment_ids) == 0
    assert (np.asarray(first.wave)[padding] == 0).all()


def test_which_peers_take_part():
    names = bench_peers.contestants(["jax.nn", "torch sdpa"])
    assert names[-6:-4] == ["jax.nn xla", "jax.nn cudnn"]
    assert [name.removeprefix("torch sdpa ") for name in names[-4:]] == ["flash", "cudnn", "efficient", "math"]
    assert bench_peers.contestants(["cudnn offsets"])[-1] == "cudnn offsets"
    assert bench_peers.contestants(["none"])[-1] == "bestiary xla"
    with pytest.raises(bench_peers.Refused, match="generates different dropout bits"):
        bench_peers.enter("jax.nn xla", dataclasses.replace(CASE, dropout=0.1), [], {})


# Layers.


def test_operations_of_layers_by_hand():
    attention, recurrent, convolution, restricted = layers_bench.describe(length=4, width=64, kernel=3, neighbourhood=2)
    assert (attention.operations, attention.sequential, attention.path) == (2 * 16 * 64, 1, 1)
    assert (recurrent.operations, recurrent.sequential, recurrent.path) == (2 * 4 * 64**2, 4, 4)
    assert (convolution.operations, convolution.path) == (3 * 4 * 64**2, 2)
    assert (restricted.operations, restricted.path) == (2 * (2 + 3 + 3 + 2) * 64, 2)


def test_layers_compute_what_they_are_called():
    config = layers_bench.LayersBenchConfig(width=64, neighbourhood=2)
    rows = jax.random.normal(jax.random.key(1), (2, 5, 64))
    (attend, _), (recur, (inputs, state)), (convolve, (kernel,)), (near, _) = layers_bench.layers(config, "float32")
    hidden = jnp.zeros((2, 64))
    for n in range(5):
        hidden = jnp.tanh(rows[:, n] @ inputs + hidden @ state)
    np.testing.assert_allclose(recur(rows, (inputs, state))[:, -1], hidden, atol=1e-5)
    middle = sum(rows[:, 1 + n] @ kernel[n] for n in range(3))
    np.testing.assert_allclose(convolve(rows, (kernel,))[:, 2], middle, atol=1e-5)
    scores = jnp.einsum("bld,bsd->bls", rows, rows) / 8
    np.testing.assert_allclose(attend(rows, ()), jax.nn.softmax(scores) @ rows, atol=1e-5)
    far = np.abs(np.arange(5)[:, None] - np.arange(5)) > 1
    np.testing.assert_allclose(near(rows, ()), jax.nn.softmax(jnp.where(far[None], -jnp.inf, scores)) @ rows, atol=1e-5)


def test_layers_command(tmp_path, capsys):
    arguments = ["--lengths", "8", "--tokens", "17", "--width", "64", "--samples", "1", "--sample-seconds", "0.001"]
    assert cli.main(["bench", "layers", *arguments, "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "layers-cpu.json").read_text())
    assert [(entry["length"], entry["rows"]) for entry in result["entries"]] == [(8, 2)] * 4
    assert all(entry["forward"]["median"] > 0 for entry in result["entries"])
    assert (tmp_path / "layers-cpu.png").read_bytes().startswith(b"\x89PNG")
    assert "| O(n d^2) |" in capsys.readouterr().out.replace("   ", " ")
    for wrong, message in (
        (["--lengths", "8,x"], "--lengths: expected integers above 1"),
        (["--width", "100"], "--width: expected a multiple of 64, found 100"),
        (["--lengths", "4096"], "--tokens: expected at least the longest row, 4096"),
    ):
        assert cli.main(["bench", "layers", *wrong, "--out", str(tmp_path)]) == 2
        assert message in capsys.readouterr().err


def test_machine_names_what_was_used(monkeypatch):
    monkeypatch.setattr(bench_timing.os, "cpu_count", lambda: 8)
    monkeypatch.setattr(bench_timing.os, "sched_getaffinity", lambda _: {0, 3}, raising=False)
    assert re.fullmatch(r"2 of 8 cores, \w+ CPU", bench_timing.machine()["device"])
    device = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H200", client=types.SimpleNamespace())
    monkeypatch.setattr(bench_timing.jax, "devices", lambda: [device])
    assert bench_timing.machine()["device"] == "NVIDIA H200"


def test_trained_translators_are_compared_by_their_runs(tmp_path, capsys):
    for name, bleu in (("lstm-plain", 8.0), ("gru-attention", 20.0)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"preset": name}))
        results = {"held_out": {"bleu_lowercase": bleu}, "parameters": 2_000_000, "steps": 100, "target_tokens": 1e6}
        results |= {"target_tokens_per_second": 1000.0, "seconds_in_steps": 600.0}
        (folder / "results.json").write_text(json.dumps(results))
        lines = [
            {"step": 50, "loss": 1.0},
            *({"step": step, "eval/bleu_lowercase": bleu * step / 100} for step in (50, 100)),
        ]
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    runs = [str(tmp_path / "lstm-plain"), str(tmp_path / "gru-attention")]
    assert cli.main(["bench", "layers", "--runs", *runs, "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"lstm-plain +\| +2.00 \| +8.00 \| +1.00 \| +1,000 \| +not reached", shown)
    assert re.search(r"gru-attention +\| +2.00 \| +20.00 \| +1.00 \| +1,000 \| +5.0 ", shown)
    assert (tmp_path / "layers-trained.png").read_bytes().startswith(b"\x89PNG")
    assert cli.main(["bench", "layers", "--runs", str(tmp_path / "none"), "--out", str(tmp_path)]) == 2
    assert "no finished run" in capsys.readouterr().err
