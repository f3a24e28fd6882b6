"""Kill processes of a run at random, start it again with other numbers of processes, and compare with a run left alone.

    python bench/hosts.py --out DIR --kills 10

Eight CPU devices are divided over one, two or four processes. Compared are the losses, the final parameters, and the
rows of the data that each step read, by all processes together. Started again, it goes on where it was.
"""

import argparse
import json
import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

DEVICES, STEPS = 8, 60

# The command, which also notes the rows that each step reads.
CHILD = """
import json, os, sys
from bestiary.train.pretrain import data
read = data.PhasedBatches.__next__
def noted(self):
    batch = read(self)
    with open(os.environ["ROWS"], "a") as file:
        file.write(json.dumps([self._done, batch["row_ids"].tolist()]) + "\\n")
    return batch
data.PhasedBatches.__next__ = noted
from bestiary.train.cli import main
raise SystemExit(main())
"""


def start(options: argparse.Namespace, name: str, processes: int) -> list[subprocess.Popen]:
    """Start a run with so many processes."""
    out = options.out / name
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = f"pretrain --model bert-tiny --vocab-size 200 --sequence-length 32 --batch-tokens 512 --steps {STEPS}"
    flags += f" --log-every 1 --checkpoint-every 5 --evaluation-rows 16 --mesh data=4,fsdp=2 --out {out}"
    flags += f" --corpus {options.out / 'corpus'} --cache {options.out / 'cache'}"
    started = []
    for process in range(processes):
        more = f" --coordinator 127.0.0.1:{port} --processes {processes} --process {process}" if processes > 1 else ""
        environment = os.environ | {
            "JAX_NUM_CPU_DEVICES": str(DEVICES // processes),
            "JAX_PLATFORMS": "cpu",
            "ROWS": str(options.out / f"{name}-rows-{processes}-{process}.jsonl"),
        }
        log = (options.out / f"{name}-{process}.log").open("a")
        command = [sys.executable, "-c", CHILD, *(flags + more).split()]
        started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    return started


def finish(started: list[subprocess.Popen]) -> None:
    """Wait for a run's end."""
    statuses = [process.wait() for process in started]
    if any(statuses):
        raise SystemExit(f"exit statuses {statuses}: see the logs")


def kill(started: list[subprocess.Popen]) -> None:
    """End all processes of a run, as a scheduler does when one is lost."""
    for one in started:
        one.kill()
        one.wait()


def steps_done(out: Path) -> int:
    """Return the number of steps that a run has logged."""
    path = out / "metrics.jsonl"
    lines = [line for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []
    return max((json.loads(line)["step"] for line in lines), default=0)


def killed(options: argparse.Namespace, name: str, counts: list[int]) -> list[str]:
    """Run with kills, each time with the next number of processes; return what was done, by earlier starts too."""
    out, note = options.out / name, options.out / f"{name}-kills.txt"
    done = note.read_text().splitlines() if note.exists() else []
    for number in range(len(done), options.kills):
        if (out / "results.json").exists():  # an earlier start, which was to kill less often, brought it to its end
            break
        draw = random.Random(f"{options.seed} {name} {number}")
        processes = counts[number % len(counts)]
        started = start(options, name, processes)
        at = steps_done(out) + draw.randint(1, max(1, (STEPS - 2 - steps_done(out)) // (options.kills - number)))
        while all(one.poll() is None for one in started) and steps_done(out) < at:
            time.sleep(0.02)
        if any(one.poll() is not None for one in started):
            kill(started)
            raise SystemExit(f"{name}: a process ended before it was killed: see the logs")
        victim = draw.randrange(processes)
        started[victim].kill()
        time.sleep(0.2)
        kill(started)
        done.append(f"process {victim} of {processes} after step {steps_done(out)}")
        note.write_text("".join(f"{line}\n" for line in done))
        print(f"{name}: killed {done[-1]}", flush=True)
    if not (out / "results.json").exists():
        finish(start(options, name, counts[options.kills % len(counts)]))
    return done


def rows(options: argparse.Namespace, name: str) -> dict[int, list]:
    """Return step -> the rows that its processes read, as last read by each number of processes."""
    found: dict[int, list] = {}
    files: dict[int, list[Path]] = {}
    for path in sorted(options.out.glob(f"{name}-rows-*.jsonl")):
        files.setdefault(int(path.stem.split("-")[-2]), []).append(path)
    for paths in files.values():
        parts: dict[int, list] = {}
        for path in paths:
            last = dict(json.loads(line) for line in path.read_text().splitlines() if line.endswith("]"))
            for step, part in last.items():
                parts.setdefault(step, []).append(part)
        for step, each in parts.items():
            if len(each) == len(paths):  # a kill may leave a step that not all of them began
                together = [row for part in each for row in part]
                assert found.setdefault(step, together) == together, f"step {step} read other rows"
    return found


def compare(options: argparse.Namespace, name: str, other: str) -> dict:
    """Compare two finished runs."""
    mine, theirs = (load_file(options.out / run / "model" / "model.safetensors") for run in (name, other))
    apart = max(float(np.abs(mine[key] - theirs[key]).max()) for key in theirs)
    losses = [
        [json.loads(line).get("loss") for line in (options.out / run / "metrics.jsonl").read_text().splitlines()]
        for run in (name, other)
    ]
    relative = max(abs(a - b) / b for a, b in zip(*losses, strict=True) if a is not None)
    read, expected = rows(options, name), rows(options, other)
    return {
        "run": name,
        "beside": other,
        "parameters_bit_equal": all(np.array_equal(mine[key], theirs[key]) for key in theirs),
        "parameters_apart": apart,
        "losses_apart": relative,
        "same_rows_at_every_step": all(read.get(step) == expected[step] for step in range(1, STEPS + 1)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a new folder, or that of an earlier start")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    corpus = options.out / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    words = [a + b for a in ("ba", "ko", "li", "mu", "ter", "san", "vo") for b in ("n", "rd", "st", "lo", "ma", "x")]
    for number in range(30):
        lines = (" ".join(draw.choices(words, k=draw.randint(4, 14))).capitalize() + "." for _ in range(40))
        (corpus / f"{number:02}.txt").write_text("\n\n".join(lines))
    for name, processes in (("one", 1), ("two", 2)):
        if not (options.out / name / "results.json").exists():
            finish(start(options, name, processes))
    found = [compare(options, "two", "one")]
    print(json.dumps(found[-1]), flush=True)
    for name, counts, beside in (("killed-any", [2, 1, 4], "one"), ("killed-two", [2], "two")):
        kills = killed(options, name, counts)
        found.append(compare(options, name, beside) | {"kills": kills})
        print(json.dumps(found[-1]), flush=True)
    (options.out / "hosts.json").write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
