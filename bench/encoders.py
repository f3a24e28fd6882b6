"""Measure the pretraining of encoders beside PyTorch with transformers, in turn, on one core.

    taskset -c 0 uv run python bench/encoders.py --corpus BOOKS --tokenizers DIR --peer PEER/bin/python step_torch.py

Ours is `bestiary bench pretrain` with the objective of each family's paper, on packed rows of text. The peer is a
script that prints the tokens/s of training steps of a model of the same size on full rows of random ids: of each
family's masked language model, with logits at all positions, and for ELECTRA of the discriminator alone. Both have the
vocabulary of a released tokenizer. Times are CPU time, so that other work on the machine counts little. Prints a JSON
line per family: real tokens/s of each run, and the median over the pairs of their ratio.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

FAMILIES: dict[str, tuple[str, str, dict[str, int], str]] = {
    # our size; the peer's family, and its size beside 4 x 256; the released tokenizer of both
    "bert": ("bert-mini", "bert", {}, "bert-base-uncased"),
    "roberta": ("roberta-mini", "roberta", {}, "roberta-base"),
    "albert": ("albert-mini", "albert", {}, "albert-base-v2"),
    "electra": ("electra-mini", "electra", {}, "bert-base-uncased"),
    "spanbert": ("spanbert-mini", "bert", {}, "bert-base-uncased"),
    "modernbert": ("ettin-encoder-17m", "modernbert", {"layers": 7, "feed-forward": 384}, "roberta-base"),
    "distilbert": ("distilbert-mini", "distilbert", {"layers": 2}, "bert-base-uncased"),
}
VOCABULARIES = {"bert-base-uncased": 30_522, "roberta-base": 50_265, "albert-base-v2": 30_000}

CPU_TIME = "import runpy, sys, time; time.perf_counter = time.process_time; sys.argv = sys.argv[1:]"
"""Begins the peer's program: its clock is CPU time."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", nargs="+", required=True)
    parser.add_argument("--cache", help="as for `bestiary pretrain`")
    parser.add_argument("--tokenizers", required=True, help=f"folder with {', '.join(VOCABULARIES)}")
    parser.add_argument("--peer", nargs=2, required=True, metavar=("PYTHON", "SCRIPT"))
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    for name, default in dict(pairs=3, length=512, rows=4, steps=9, skip=3).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    a = parser.parse_args()
    for family in a.families:
        size, peer, sizes, tokenizer = FAMILIES[family]
        sizes = {**sizes, "vocab": VOCABULARIES[tokenizer]}
        pairs = [(ours(a, size, tokenizer), theirs(a, peer, sizes)) for _ in range(a.pairs)]
        found = {
            "family": family,
            "ours": [round(ours) for ours, _ in pairs],
            "peer": [round(theirs) for _, theirs in pairs],
            "ratio": round(statistics.median(ours / theirs for ours, theirs in pairs), 2),
        }
        print(json.dumps(found), flush=True)


def ours(a: argparse.Namespace, size: str, tokenizer: str) -> float:
    """Return the real tokens of the median step per second of CPU time."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        command = [str(Path(sys.executable).with_name("bestiary")), "bench", "pretrain", "--corpus", *a.corpus]
        flags = {"model": size, "tokenizer": Path(a.tokenizers) / tokenizer, "sequence-length": a.length}
        flags |= {"rows": a.rows, "steps": a.steps, "skip": a.skip, "warmup": 1}
        run(command + options({**flags, "out": out, **({"cache": a.cache} if a.cache else {})}))
        found = json.loads(out.read_text(encoding="utf-8"))
    tokens = found["real_tokens_per_second_of_median_step"] * found["step_seconds"]["median"]
    return tokens / found["cpu_time"]["median_step_seconds"]


def theirs(a: argparse.Namespace, family: str, sizes: dict[str, int]) -> float:
    """Return the tokens/s that the peer prints."""
    python, script = a.peer
    command = [python, "-c", f"{CPU_TIME}; runpy.run_path(sys.argv[0], run_name='__main__')", script, "train"]
    flags = {"family": family, "length": a.length, "rows": a.rows, "steps": a.steps, "skip": a.skip}
    return json.loads(run(command + options({**flags, "threads": 1, **sizes})).splitlines()[-1])["tokens_per_s"]


def options(flags: dict[str, Any]) -> list[str]:
    """Return flags as a command line has them."""
    return [part for name, value in flags.items() for part in (f"--{name}", str(value))]


def run(command: list[str]) -> str:
    """Run a program; return what it prints.

    Raises:
        SystemExit: it failed.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    main()
