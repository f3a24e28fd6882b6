"""Ten minutes on a chip: are the attention kernels right there, then how fast. `bench/chip.py` runs it.

In this order: the device and its versions; one small call; checks of every kind of call and of the conformance suite's
cases, several at a time; the chip's ceilings; times beside the other implementations, most wanted first. Each job runs
in a worker process with a time limit, and its result is on disk before the next begins (`results.jsonl`), so that a
hang, a crash or a lost device context costs its own job alone. `table.md`, `chart.png` and `chip_table.py`, the record
of what was right and fastest, are made from that file at the end, when the run is ended, and by `--report`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import queue
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .. import chip_table
from ..conformance import CASES
from ..tuning import Key
from .cases import Case, abstract, parse_shapes
from .jobs import timing_case, worker
from .report import chart, described, entered, markdown
from .timing import METHOD, Ceilings, write
from .tune import call_of
from .workers import PLANTS, Results, Worker

ALL = {"bias": "relative", "segments": "packed", "rate": 0.1}
DTYPES = {"gpu": "bfloat16", "tpu": "bfloat16", "cpu": "bfloat16"}
OURS = {"gpu": "hopper", "tpu": "tpu", "cpu": "xla"}

# Lengths below and above one tile, no multiple of 8, one past a tile; head sizes of every swizzle; what models ask for.
CHECKS: list[dict[str, Any]] = [
    {"L": 512}, {"L": 512, "bias": "relative"}, {"L": 512, "D": 128}, {"L": 128},
    {"L": 512, "segments": "packed", "rate": 0.1}, {"L": 512, "segments": "packed"},
    {"L": 61, "segments": "packed"}, {"L": 128, "segments": "packed", "rate": 0.1}, {"L": 509, "causal": True},
    {"L": 1100, **ALL}, {"L": 640, "causal": True, **ALL},
    {"L": 700, "causal": True, "segments": "packed", "rate": 0.1},
    {"L": 640, "D": 128, **ALL}, {"L": 120, "B": 20, **ALL}, {"L": 256, **ALL},
    {"L": 300, "S": 700, "window": (100, 7), "softcap": 3.0, "H": 8, "K": 2},
    {"L": 509, "bias": "dense", "rate": 0.1}, {"L": 300, "D": 80, "H": 8, "K": 2, "causal": True},
    {"L": 300, "D": 48, **ALL}, {"L": 300, "D": 32, "Dv": 96, "dtype": "float16"},
    {"L": 300, "D": 96, "segments": "packed"}, {"L": 700, "D": 256, **ALL}, {"L": 700, "D": 256, "causal": True},
    {"L": 300, "D": 192, "Dv": 128}, {"L": 640, "dtype": "float16", **ALL}, {"L": 1, "S": 300}, {"L": 8, "S": 8},
    {"B": 40, "L": 128, "H": 16, "causal": True}, {"L": 4096, "B": 1, **ALL},
    {"L": 200, "S": 100, "segments": "packed", "rate": 0.1}, {"L": 2000, "segments": "any", "rate": 0.1},
    {"L": 2016, "B": 32},  # tiles of 192 queries on Hopper
]  # fmt: skip

# Shape, bias, causal, packed: the most wanted first.
TIMES = [
    ("32x512x32x64", "none", False, None), ("8x2048x32x64", "none", False, None),
    ("4x4096x32x64", "none", False, "wikipedia"), ("32x512x32x64", "relative", False, None),
    ("32x512x16x128", "none", False, None), ("8x2048x16x128", "none", False, None),
    ("32x512x32x64", "none", True, None), ("128x128x32x64", "none", False, None),
    ("32x512x32x64", "none", False, "wikipedia"), ("4x4096x32x64", "none", True, None),
    ("1x16384x32x64", "none", False, None),
]  # fmt: skip

# The contestants of plain rows, of packed rows and of a relative bias: those of the first round, then the others.
CONTESTANTS: dict[str, dict[str, tuple[Sequence[str], Sequence[str]]]] = {
    "gpu": {
        "plain": (("bestiary hopper", "bestiary cudnn", "torch sdpa cudnn"),
                  ("tokamax mosaic_gpu", "torch sdpa flash", "torch flex", "jax.nn xla", "bestiary xla")),
        "packed": (("bestiary hopper", "cudnn offsets", "torch varlen"),
                   ("tokamax mosaic_gpu", "torch flex", "jax.nn cudnn", "torch sdpa efficient")),
        "relative": (("bestiary hopper", "tokamax mosaic_gpu", "torch flex"),
                     ("jax.nn cudnn", "torch sdpa efficient", "jax.nn xla", "bestiary xla")),
    },
    "tpu": dict.fromkeys(
        ("plain", "packed", "relative"),
        (("bestiary tpu", "splash attention"), ("tokamax mosaic_tpu", "jax.nn xla", "bestiary xla")),
    ),
    "cpu": dict.fromkeys(("plain", "packed", "relative"), (("bestiary xla", "jax.nn xla"), ())),
}  # fmt: skip

REHEARSED = [{"L": 40}, {"L": 70, **ALL}, {"L": 20}, {"L": 24, "causal": True}, {"L": 22}, {"L": 50, "segments": "any"}]
REHEARSED_FAULTS = ("hang:L=20", "crash:L=24", "sticky:L=22", "hang:jax.nn xla")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return 0, or 1 if anything of ours was wrong or failed, or 2 for bad arguments."""
    parser = argparse.ArgumentParser("chip.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--budget", type=float, default=540, help="seconds that the whole run may take")
    parser.add_argument(
        "--parallel", type=int, default=0, help="checks at a time; 0: 6 on a GPU, 2 on a CPU, 1 on a TPU"
    )
    parser.add_argument(
        "--record", action="store_true", help="write what was right and fastest to kernels/chip_table.py"
    )
    parser.add_argument(
        "--report", action="store_true", help="only make the table and chart of what --out already holds"
    )
    parser.add_argument("--rehearse", action="store_true", help="tiny cases on a CPU, with faults planted")
    parser.add_argument(
        "--plant",
        action="append",
        default=[],
        metavar="FAULT:WORDS",
        help="plant a fault (hang, crash; sticky: a lost device context) in the first job whose name has these words",
    )
    given = parser.parse_args(arguments)
    results = Results(given.out / "results.jsonl")
    there = results.path.exists()
    planted = given.plant or (REHEARSED_FAULTS if given.rehearse else ())
    faults = [(text.partition(":")[0], text.partition(":")[2]) for text in planted]
    if given.report != there:
        found = (
            "none there" if given.report else f"{results.path} of an earlier run: choose another folder, or --report"
        )
        return _refuse(f"--out: expected {'results.jsonl' if given.report else 'no results yet'}, found {found}")
    if bad := [fault for fault, words in faults if fault not in PLANTS or not words]:
        return _refuse(f"--plant: expected FAULT:WORDS with one of {', '.join(PLANTS)}, found {bad[0]!r}")
    if not given.report:
        given.out.mkdir(parents=True, exist_ok=True)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        run = Run(results, given.budget, faults, rehearse=given.rehearse)
        try:
            run.all(given.parallel)
        finally:
            run.stop()
            print(written(results, record=given.record))
        if given.rehearse:
            unexpected = run.bad ^ {name for name, _ in run.planted}
            print(
                f"rehearsed: {len(run.planted)} faults planted, {len(run.bad)} jobs failed",
                *sorted(unexpected),
                sep="\n",
            )
            return int(bool(unexpected) or bool(run.faults))
        return int(bool(run.bad))
    print(written(results, record=given.record))
    return 0


def _refuse(message: str) -> int:
    print(f"chip.py: {message}", file=sys.stderr)
    return 2


class Run:
    """One run: what is asked of the workers, in which order, and until when."""

    def __init__(self, results: Results, budget: float, faults: Sequence[tuple[str, str]], *, rehearse: bool) -> None:
        self.results, self.rehearse = results, rehearse
        self.start = time.monotonic()
        self.end = self.start + budget
        self.faults = list(faults)
        self.planted: list[tuple[str, str]] = []
        self.bad: set[str] = set()
        self.workers: list[Worker] = []
        self.lock = threading.Lock()

    @property
    def left(self) -> float:
        """Return the seconds left."""
        return self.end - time.monotonic()

    def say(self, line: str) -> None:
        """Print a line with the seconds since the start."""
        print(f"[{time.monotonic() - self.start:5.0f}] {line}", flush=True)

    def worker(self, **environment: str) -> Worker:
        """Return a worker that shares the device."""
        shared = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | environment
        log = self.results.path.with_name("log.txt")
        self.workers.append(worker(log, shared, startup=5 if self.rehearse else 40))
        return self.workers[-1]

    def stop(self) -> None:
        """End all workers."""
        for asked in self.workers:
            asked.stop()

    def ask(self, asked: Worker, job: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Give a job to a worker, and record the answer."""
        with self.lock:
            for fault, words in self.faults:
                if words in job["name"]:
                    self.faults.remove((fault, words))
                    self.planted.append((job["name"], fault))
                    job = job | {"plant": fault}
                    seconds = min(seconds, 3.0) if fault == "hang" else seconds
                    break
        return self.record(job, asked.ask(job, seconds))

    def record(self, job: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
        """Write an answer down, and print what matters of it."""
        self.results.add(job, answer)
        bad = answer.get("failed") or answer.get("wrong")
        ours = job["kind"] != "contest" or job["name"].startswith("bestiary")
        with self.lock:
            if bad and (ours or "plant" in job) and answer.get("failed") != NOT_REACHED:
                self.bad.add(job["name"])
        self.say(f"{'BAD ' if bad else 'ok  '} {job['name']}: {_short(answer)}")
        return answer

    def all(self, parallel: int) -> None:
        """Ask for everything."""
        share = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.12"}
        with self.worker(**share) as first:
            now = {"date": datetime.now(UTC).date().isoformat(), "command": shlex.join(["python3", *sys.argv])}
            here: dict[str, Any] = {}
            for name in ("where", "where, again"):  # without the answer nothing can be asked
                here = self.ask(first, {"kind": "where", "name": name, **now}, 20)
                if "failed" not in here:
                    break
            else:
                return
            platform = here["platform_name"]
            small = [{"L": 128 if self.rehearse else 512}]
            for job in checks(small, platform, "smoke "):
                self.ask(first, job, 45)
            self.check(first, share, platform, parallel or {"gpu": 6, "cpu": 2}.get(platform, 1))
        with self.worker() as one:
            timing = {"samples": 3 if self.rehearse else 5, "least_seconds": 0.01 if self.rehearse else 0.06}
            job = {"kind": "ceilings", "name": "ceilings", "dtype": DTYPES[platform], "timing": timing}
            self.ask(one, job, min(40, self.left))
            for job in contests(platform, timing, rehearse=self.rehearse):
                if self.left < 15:
                    self.record(job, {"failed": NOT_REACHED})
                else:
                    self.ask(one, job, min(20 if self.rehearse else 45, self.left - 10))

    def check(self, first: Worker, share: Mapping[str, str], platform: str, parallel: int) -> None:
        """Run the checks, several at a time, for at most two fifths of the time. Times mean nothing here."""
        jobs: queue.Queue[dict[str, Any]] = queue.Queue()
        for job in [
            *checks(REHEARSED if self.rehearse else CHECKS, platform),
            *suite(platform, rehearse=self.rehearse),
        ]:
            jobs.put(job)
        total, until = jobs.qsize(), time.monotonic() + 0.4 * self.left

        def work(asked: Worker) -> None:
            with asked:
                while time.monotonic() < until:
                    try:
                        job = jobs.get_nowait()
                    except queue.Empty:
                        break
                    self.ask(asked, job, min(20 if self.rehearse else 45, max(5.0, until - time.monotonic())))

        workers = [first, *(self.worker(**share) for _ in range(parallel - 1))]
        threads = [threading.Thread(target=work, args=(asked,), daemon=True) for asked in workers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        while not jobs.empty():
            self.record(jobs.get(), {"failed": NOT_REACHED})
        self.say(f"CHECKED: {len(self.bad)} bad of {total + 1}: {'; '.join(sorted(self.bad)) or 'none'}")


NOT_REACHED = "not reached"


def _short(answer: Mapping[str, Any]) -> str:
    for key in ("failed", "reason"):
        if key in answer:
            return str(answer[key])
    if wrong := answer.get("wrong"):
        return "; ".join(wrong)
    hidden = ("errors", "wrong", "features", "versions", "seconds")
    shown = {key: value for key, value in answer.items() if key not in hidden}
    if "forward" in shown:
        shown = {which: f"{shown[which]['median'] * 1e6:.4g} us" for which in ("forward", "backward")}
    return f"{json.dumps(shown)[:200] if shown else ''} ({answer['seconds']:.3g} s)"


def checks(wanted: Sequence[Mapping[str, Any]], platform: str, prefix: str = "") -> Iterator[dict[str, Any]]:
    """Yield the jobs that check our backend on these calls: L, S, B, H, K, D, Dv, dtype, and what `Case` has."""
    for fields in wanted:
        rest = dict(fields)
        length, dtype = rest.pop("L"), rest.pop("dtype", DTYPES[platform])
        heads, size = rest.pop("H", 4), rest.pop("D", 64)
        sizes = (
            rest.pop("B", 2), length, rest.pop("S", length), heads, rest.pop("K", heads), size, rest.pop("Dv", size)
        )  # fmt: skip
        name = prefix + " ".join(f"{key}={value}" for key, value in fields.items())
        case: dict[str, Any] = {"name": name, "sizes": sizes, "bias_shape": (1, heads)}
        case |= {key: rest.pop(key) for key in ("bias", "segments", "rate") if key in rest}
        job = {"kind": "check", "name": name, "case": case | {"options": rest}}
        yield job | {"implementation": OURS[platform], "dtype": dtype}


def suite(platform: str, *, rehearse: bool) -> Iterator[dict[str, Any]]:
    """Yield the jobs that run the conformance suite's cases on the device: as they are, and of several tiles."""
    for case in CASES[6:7] if rehearse else CASES:
        for times in (1,) if rehearse else (1, 12):
            job = {"kind": "check", "name": f"suite x{times}: {case.name}", "exact": True}
            job |= {"case": dataclasses.asdict(case.stretched(times))}
            yield job | {"implementation": OURS[platform], "dtype": DTYPES[platform]}


def contests(platform: str, timing: Mapping[str, Any], *, rehearse: bool) -> Iterator[dict[str, Any]]:
    """Yield the jobs that time the contestants: the first round of every case, then the second."""
    times = [("1x64x2x32", "none", False, None), ("1x64x2x32", "none", False, "short")] if rehearse else TIMES
    for turn in (0, 1):
        for shape, bias, causal, packed in times:
            (sizes,) = parse_shapes(shape)
            case = Case(*sizes, "float32" if rehearse else DTYPES[platform], bias, causal, packed)
            kind = "packed" if packed else "relative" if bias == "relative" else "plain"
            for name in CONTESTANTS[platform][kind][turn]:
                yield {
                    "kind": "contest", "name": name, "case": dataclasses.asdict(case), "sets": 2 if rehearse else 3,
                    "seed": 0, "timing": dict(timing),
                }  # fmt: skip


def written(results: Results, *, record: bool) -> str:
    """Make the table, the chart and the record of whatever the results hold, and return the table."""
    if not results.path.exists():
        return "nothing was measured"
    result = collected(results)
    text = summary(result)
    write(results.path.with_name("table.md"), text + "\n")
    if result["chip"] != "cpu":
        for path in [results.path.with_name("chip_table.py"), *([Path(chip_table.__file__)] if record else [])]:
            write(path, recorded(result))
    try:
        write(results.path.with_name("chart.png"), chart(result))
    except ImportError:
        text += "\n(no chart: matplotlib is not installed)"
    return text


def collected(results: Results) -> dict[str, Any]:
    """Return the results in the form of `bestiary bench attention`'s, with the checks."""
    found: dict[str, Any] = {
        "device": "an unknown device", "chip": "cpu", "versions": {"jax": "unknown"}, "date": "unknown", "command": "",
        "method": METHOD, "dtype": "", "ceilings": None, "checks": [], "cases": [],
    }  # fmt: skip
    ceilings: Ceilings | None = None
    cases: dict[str, dict[str, Any]] = {}
    for job, answer in results.read():
        if job["kind"] == "where":
            found |= {"date": job["date"], "command": job["command"]} | answer
        elif job["kind"] == "check":
            found["checks"].append({"name": job["name"], "dtype": job["dtype"]} | answer)
        elif job["kind"] == "ceilings" and "failed" not in answer:
            ceilings = Ceilings(answer["operations"], answer["bytes"])
            found["dtype"] = job["dtype"]
            found["ceilings"] = {"matmul_tflops": answer["operations"] / 1e12, "copy_tb_per_s": answer["bytes"] / 1e12}
        elif job["kind"] == "contest":
            case = timing_case(job["case"])
            if case.label not in cases:
                cases[case.label] = described(case, job["seed"])
            cases[case.label]["contestants"].append(entered(cases[case.label], job["name"], answer, ceilings))
    return found | {"cases": list(cases.values())}


def summary(result: Mapping[str, Any]) -> str:
    """Return the checks and the times as Markdown."""
    bad = [check for check in result["checks"] if check.get("failed") or check.get("wrong")]
    lines = [
        f"# {result['device']}, jax {result['versions']['jax']}, {result['date']}",
        "",
        f"Right: {len(result['checks']) - len(bad)} of {len(result['checks'])} checks.",
        "",
        *(f"- {check['name']}: {check.get('failed') or '; '.join(check['wrong'])}" for check in bad),
        "",
    ]
    return "\n".join(lines) + markdown(result)


def recorded(result: Mapping[str, Any]) -> str:
    """Return the text of `chip_table.py` with what was right and what was fastest in this run."""
    proven = {key: dict(rows) for key, rows in chip_table.PROVEN.items()}
    fastest = dict(chip_table.FASTEST)
    wrong = {tuple(check["features"]) for check in result["checks"] if check.get("wrong") and "features" in check}
    key = (OURS["tpu"] if result["chip"].startswith("v") else OURS["gpu"], result["chip"], result["versions"]["jax"])
    for check in result["checks"]:
        if "features" in check and tuple(check["features"]) not in wrong:
            proven.setdefault(key, {})[tuple(check["features"])] = result["date"]
    for features in wrong:
        proven.get(key, {}).pop(features, None)
    for fields in result["cases"]:
        times = {
            entry["name"].removeprefix("bestiary "): entry["forward"]["median"] + entry["backward"]["median"]
            for entry in fields["contestants"]
            if entry["name"].startswith("bestiary ") and "backward" in entry
        }
        if len(times) > 1:
            case = timing_case({field.name: fields[field.name] for field in dataclasses.fields(Case)})
            row = dataclasses.astuple(Key.of(call_of(case, abstract(case)), result["chip"]))
            fastest[row] = min(times, key=times.__getitem__)
    text = Path(chip_table.__file__).read_text()
    for name, rows in (("PROVEN", _nested(proven)), ("FASTEST", _rows(fastest))):
        head, _, rest = text.partition(f"\n{name}: ")
        kind, _, after = rest.partition(" = ")
        _, _, after = after.partition("\n\n")
        text = f"{head}\n{name}: {kind} = {rows}\n" + (f"\n{after}" if after else "")
    return text


def _nested(rows: Mapping[Any, Mapping[Any, str]]) -> str:
    lines = [f"    {key!r}: {_rows(value, '    ')}," for key, value in sorted(rows.items())]
    return "\n".join(["{", *lines, "}"]).replace("'", '"') if lines else "{}"


def _rows(rows: Mapping[Any, str], indent: str = "") -> str:
    lines = [f"{indent}    {key!r}: {value!r}," for key, value in sorted(rows.items())]
    return "\n".join(["{", *lines, f"{indent}}}"]).replace("'", '"') if lines else "{}"
