"""The table of block sizes: which row a call finds, how it is filled, and how candidates are thinned."""

import dataclasses
import importlib.util
import json
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from bestiary.kernels import AlibiBias, DenseBias, RelativeBias, tuning, tuning_table, xla
from bestiary.kernels.bench import tune
from bestiary.kernels.bench.cases import BenchError, Case
from bestiary.kernels.bench.timing import Seconds
from bestiary.kernels.call import Call
from bestiary.kernels.hopper import backend as hopper
from bestiary.kernels.tpu import backend as tpu
from bestiary.kernels.tuning import Key

KEY = Key("h200", "bfloat16", 64, 512, "full", "none", False)


def call(length=300, keys=None, size=48, **change):
    def array(tokens):
        return jnp.zeros((1, tokens, 2, size), jnp.bfloat16)

    given = Call(
        query=array(length), key=array(keys or length), value=array(keys or length), bias=None, query_segment_ids=None,
        key_segment_ids=None, dropout_seeds=None, causal=False, window=(None, None), scale=1.0, softcap=None,
        dropout_rate=0.0,
    )  # fmt: skip
    return dataclasses.replace(given, **change)


IDS = jnp.ones((1, 300), jnp.int32)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (call(), {}),
        (call(keys=513), {"length": 1024}),
        (call(length=3), {"length": 128}),
        (call(length=512), {}),
        (call(length=20000), {"length": 16384}),
        (call(size=65), {"size": 96}),
        (call(size=256), {"size": 256}),
        (call(causal=True, window=(3, None)), {"mask": "causal+window"}),
        (call(query_segment_ids=IDS, key_segment_ids=IDS), {"mask": "segments"}),
        (call(bias=AlibiBias(jnp.ones(2)), dropout_rate=0.1), {"bias": "row", "dropout": True}),
        (call(bias=DenseBias(jnp.ones((1, 1, 300, 300)))), {"bias": "dense"}),
    ],
)
def test_keys(given, expected):
    assert Key.of(given, "h200") == dataclasses.replace(KEY, **expected)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("TPU v4", "v4"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v6 lite", "v6e"),
    ],
)
def test_chips(kind, name):
    assert tuning.chip_name(kind) == name


ROW = {
    "forward": (3, 128, 2),
    "query_gradient": (2, 64, 2),
    "key_gradient": (2, 64, 2),
    "bias_gradient": (2, 64, 1),
    "together": False,
    "one_pass": 0,
    "fused": 0,
}


@pytest.fixture
def on_an_h200(monkeypatch):
    """A machine with an H200, as far as the table can see, and one row."""
    device = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H200")
    monkeypatch.setattr(tuning.jax, "devices", lambda: [device])
    monkeypatch.setitem(tuning_table.ROWS, dataclasses.astuple(KEY), ROW)


def test_a_call_finds_its_row(on_an_h200):
    found = tuning.tuned(call(), hopper.Tuning)
    assert found is not None
    assert found.forward == hopper.Blocks(3, 128, 2)
    assert found.together is False
    assert tuning.flatten(found) == ROW


def test_a_call_without_a_row_takes_the_rule(on_an_h200):
    assert tuning.tuned(call(causal=True), hopper.Tuning) is None


@pytest.mark.parametrize(("change", "expected"), [({}, 3), ({"causal": True}, 2)])
def test_the_backend_takes_the_row_it_finds(on_an_h200, monkeypatch, change, expected):
    plans = []

    def seen(plan, query, *_):
        plans.append(plan)
        return query, jnp.zeros(query.shape[:3])

    monkeypatch.setattr(hopper, "_attention", seen)
    hopper.run(call(**change))
    with hopper.compiling():  # for a chip that need not be this one: the rule
        hopper.run(call(**change))
    assert [plan.tuning.forward.warpgroups for plan in plans] == [expected, 2]


def test_no_chip_no_row(monkeypatch):
    monkeypatch.setitem(tuning_table.ROWS, dataclasses.astuple(KEY), ROW)
    assert tuning.chip() is None
    assert tuning.tuned(call(), hopper.Tuning) is None


def test_a_row_of_another_version_is_named(on_an_h200, monkeypatch):
    monkeypatch.setitem(tuning_table.ROWS, dataclasses.astuple(KEY), {"forward": (3, 128, 2)})
    with pytest.raises(ValueError, match=r"expected the fields forward, query_gradient, .* found forward: run"):
        tuning.tuned(call(), hopper.Tuning)


def test_rows_are_what_the_backends_have():
    """Every checked-in row makes its backend's block sizes, and flattening is the opposite of rebuilding."""
    for key, row in tuning_table.ROWS.items():
        tuning.rebuild(hopper.Tuning if key[0] in tune.GPUS else tpu.Blocks, row)
    for kind, blocks in ((hopper.Tuning, hopper.blocks_for(64, 64)), (tpu.Blocks, tpu.choose_blocks(call()))):
        assert tuning.rebuild(kind, tuning.flatten(blocks)) == blocks


def test_the_table_reads_back(tmp_path):
    text = tune.table_text({KEY: ROW, dataclasses.replace(KEY, chip="h100"): ROW})
    path = tmp_path / "table.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location("table", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.ROWS[dataclasses.astuple(KEY)] == ROW
    assert [key[0] for key in module.ROWS] == ["h100", "h200"]
    assert '    ("h100", "bfloat16", 64, 512, "full", "none", False): {\n        "forward": (3, 128, 2),\n' in text
    # What is checked in is what would be written: nobody edits it by hand.
    rows = {Key(*key): row for key, row in tuning_table.ROWS.items()}
    assert Path(tuning_table.__file__).read_text() == tune.table_text(rows)


RELATIVE = RelativeBias(jnp.ones((32, 2)))


@pytest.mark.parametrize(
    ("chip", "given", "kernels"),
    [
        ("h200", call(512, bias=RELATIVE), ["forward", "query_gradient", "key_gradient", "bias_gradient"]),
        ("h200", call(100, bias=RELATIVE), ["one_pass", "fused", "bias_gradient"]),
        # More keys than the fused kernel holds; heads so large that it does not fit, and the other with fewer stages.
        ("h200", call(200), ["one_pass", "query_gradient", "key_gradient"]),
        ("h200", call(128, size=128), ["one_pass", "forward", "query_gradient", "key_gradient"]),
        # One kernel for the whole backward pass, and two for rows too long for it.
        ("v5e", call(512), ["forward", "key_value"]),
        ("v5e", call(8192), ["forward", "query", "key_value"]),
        ("v5e", call(200), ["key_heads"]),
    ],
)
def test_candidates_vary_one_kernel_from_the_rule(chip, given, kernels):
    _, kind, choose, _ = tune.backend_of(chip)
    rule = tuning.flatten(choose(given))
    tried = list(tune.candidates(chip, rule, given))
    assert list(dict.fromkeys(candidate.kernel for candidate in tried)) == kernels
    for kernel in kernels:
        mine = [candidate.row for candidate in tried if candidate.kernel == kernel]
        assert mine[0] == rule
        assert len(mine) > 1
        assert len({str(row) for row in mine}) == len(mine)
        for row in mine:
            tuning.rebuild(kind, row)
            assert {name for name in rule if row[name] != rule[name]} <= {kernel, "together"}


def test_what_spills_more_than_the_rule_is_out():
    tried = [tune.Candidate("forward", {"n": n}) for n in range(4)] + [tune.Candidate("query_gradient", {})]
    found = [{"spilled": 8}, {"spilled": 0}, {"spilled": 9}, {"error": "too much shared memory"}, {"spilled": 100}]
    assert [n for n in range(5) if tune.fits(tried, found, n)] == [0, 1, 4]


@pytest.mark.parametrize(("wrong", "gain"), [(None, 0.5), ((1, 64, 2), 0.5), (None, 0.99)])
def test_the_fastest_of_each_kernel_makes_the_row(monkeypatch, tmp_path, wrong, gain):
    """With times as given, and arithmetic by the reference backend: what is faster, fits and is right gets written."""
    best = {"forward": (1, 64, 2), "key_gradient": (2, 128, 1)}
    asked = []

    def run(call, blocks):
        asked.append(tuning.flatten(blocks))
        out, lse = xla.run(call)
        return (out * 1.5 if blocks.forward == hopper.Blocks(*wrong) else out) if wrong else out, lse

    def time_jax(function, sets, **_):
        jax.eval_shape(function, *sets[0])
        fast = any(asked[-1][kernel] == blocks for kernel, blocks in best.items())
        return Seconds(gain if fast else 1.0, 0.0, 0.0)

    rule = hopper.blocks_for(64, 64)
    backend = types.SimpleNamespace(run=run)
    first = tuning.flatten(rule)
    tried = [
        tune.Candidate("forward", first | {"forward": n}) for n in ((2, 128, 2), (1, 64, 2), (3, 64, 1), (3, 64, 3))
    ]
    tried += [tune.Candidate("key_gradient", first | {"key_gradient": blocks}) for blocks in ((2, 64, 2), (2, 128, 1))]
    monkeypatch.setattr(tune, "candidates", lambda *_: tried)
    monkeypatch.setattr(tune, "backend_of", lambda name: (backend, hopper.Tuning, lambda call: rule, None))
    monkeypatch.setattr(tune, "chip", lambda: "h200")
    monkeypatch.setattr(tune, "time_jax", time_jax)
    # One that spills, one that does not compile: neither is timed.
    monkeypatch.setattr(
        tune,
        "thinned",
        lambda name, case, tried: [
            {"spilled": 9} if c.row["forward"] == (3, 64, 1) else {"error": "no"} if c.row["forward"][2] == 3 else {}
            for c in tried
        ],
    )
    table = tmp_path / "table.py"
    case = Case(1, 32, 32, 2, 2, 64, "bfloat16")
    assert tune.tune([case], chip_name=None, path=table, out=tmp_path, samples=1) == 0
    assert not any(row["forward"] == (3, 64, 1) or row["forward"][2] == 3 for row in asked)
    # The same from the report, without compiling first.
    written, report = table.read_text() if table.exists() else None, tmp_path / "tune-h200.json"
    entries = json.loads(report.read_text())["keys"][0]["candidates"]
    assert [("seconds" in entry, entry["kernel"]) for entry in entries] == [
        (True, "forward"), (True, "forward"), (False, "forward"), (False, "forward"),
        (True, "key_gradient"), (True, "key_gradient"),
    ]  # fmt: skip
    monkeypatch.setattr(tune, "thinned", None)
    timed, asked[:] = len(asked), []
    thinned_before = tmp_path / "thinned.json"
    report.rename(thinned_before)
    if table.exists():
        table.unlink()
    assert tune.tune([case], chip_name=None, path=table, out=tmp_path, samples=1, report_of=thinned_before) == 0
    assert len(asked) == timed
    assert (table.read_text() if table.exists() else None) == written
    if wrong or gain > 0.98:
        assert not table.exists()
        return
    expected = tuning.flatten(rule) | best
    key = ("h200", "bfloat16", 64, 128, "full", "none", False)
    assert table.read_text() == tune.table_text({Key(*key): expected | {"together": True}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda report: report.pop("keys"), "expected a report of --tune, found KeyError: 'keys'"),
        (lambda report: report.update(chip="v5e"), "expected candidates for a h200, found some for a v5e"),
        (lambda report: report["keys"][0]["key"].update(length=512), "expected an entry for Key.*found 1 others"),
        (lambda report: report["keys"][0]["rule"].update(fused=7), "made for the default choice .*'fused': 7"),
    ],
)
def test_a_report_that_does_not_fit_is_refused(monkeypatch, tmp_path, change, message):
    case = Case(1, 32, 32, 2, 2, 64, "bfloat16")
    key = Key("h200", "bfloat16", 64, 128, "full", "none", False)
    rule = tuning.flatten(hopper.blocks_for(64, 64))
    report = {"chip": "h200", "keys": [{"key": dataclasses.asdict(key), "rule": rule, "candidates": []}]}
    change(report)
    path = tmp_path / "report.json"
    path.write_text(json.dumps(report))
    monkeypatch.setattr(tune, "chip", lambda: "h200")
    with pytest.raises(BenchError, match=message):
        tune.tune([case], chip_name=None, path=tmp_path / "table.py", out=tmp_path, samples=1, report_of=path)


@pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("jax_plugins", "jax_plugins.xla_cuda13")),
    reason="needs jax-cuda13-plugin, which compiles for a GPU that is not there",
)
def test_candidates_are_compiled_and_thinned_without_a_chip(tmp_path, monkeypatch, capsys):
    """Compiled for an H200 in a process of its own: registers, spills and shared memory of each, or why not."""

    def few(name, rule, call):
        del name
        if call.query.shape[1] > 128:
            for blocks in (rule["forward"], (1, 64, 1), (3, 192, 9)):
                yield tune.Candidate("forward", rule | {"forward": blocks})
        else:
            for kernel in ("one_pass", "fused"):
                yield from (tune.Candidate(kernel, rule | {kernel: stages}) for stages in (2, 1, 0))

    monkeypatch.setattr(tune, "candidates", few)
    table = tmp_path / "table.py"
    long, short = (Case(1, length, length, 2, 2, 64, "bfloat16") for length in (512, 64))
    assert tune.tune([long, long, short], chip_name="h200", path=table, out=tmp_path, samples=1) == 0
    assert not table.exists()
    assert "filtered but not timed" in capsys.readouterr().out
    entry, short_entry = json.loads((tmp_path / "tune-h200.json").read_text())["keys"]
    rule, small, large = entry["candidates"]
    assert 0 < small["registers"] < rule["registers"] <= 255
    assert 0 < small["shared"] < rule["shared"] < 227 * 1024
    assert rule["spilled"] == 0
    assert "shared memory" in large["error"]
    assert entry["row"] is short_entry["row"] is None
    for kernel in ("one_pass", "fused"):
        two, one, general = (found for found in short_entry["candidates"] if found["kernel"] == kernel)
        assert 0 < one["shared"] < two["shared"] < 227 * 1024
        assert 0 < two["registers"] <= 255
        assert two["spilled"] == 0
        assert "registers" not in general  # a choice of other kernels, which only the clock can compare
