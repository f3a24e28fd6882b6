"""Train word vectors with several seeds, and evaluate them, beside gensim's figures for the same text.

    python bench/words.py --corpus books/ wiki.train.tokens --similarities wordsim353.tsv simlex999.txt \
        --analogies questions-words.txt --out DIR

The settings are those of gensim's figures: vectors of 100, window 5, 5 negatives, a sample of 1e-4, 5 epochs. gensim's
wheel has the three files. Prints a JSON line for each run: of a run whose vectors are there, without its speed.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", nargs="+", required=True)
    parser.add_argument("--similarities", nargs="+", required=True)
    parser.add_argument("--analogies", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kinds", nargs="+", default=["skipgram", "cbow"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    a = parser.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    for kind in a.kinds:
        for seed in a.seeds:
            vectors, speed = a.out / f"{kind}-{seed}.bin", None
            if not vectors.is_file():
                given = ["--kind", kind, "--sample", "1e-4", "--seed", str(seed), "--out", str(vectors)]
                speed = run("train", "--corpus", *a.corpus, *given)["words_per_second"]
            files = ["--similarities", *a.similarities, "--analogies", a.analogies]
            scores = run("evaluate", str(vectors), *files, "--json")
            found = {Path(name).name: score.get("spearman", score.get("accuracy")) for name, score in scores.items()}
            print(json.dumps({"kind": kind, "seed": seed, "words_per_second": speed, **found}), flush=True)


def run(*arguments: str) -> Any:
    """Run `bestiary words`; return what it prints."""
    program = "import sys; from bestiary.train.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, "words", *arguments]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


if __name__ == "__main__":
    main()
