"""A small corpus, and the real command to run on it."""

import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

STEPS = 24
WORDS = [a + b for a in ("ba", "ko", "li", "mu", "ter", "san", "vo", "gri") for b in ("n", "rd", "st", "lo", "ma", "x")]
MAIN = "from bestiary.train.cli import main; raise SystemExit(main())"


def write_corpus(folder: Path) -> Path:
    """Thirty documents of made-up sentences."""
    generator = random.Random(0)
    folder.mkdir(parents=True)
    for number in range(30):
        sentences = [
            " ".join(generator.choices(WORDS, k=generator.randint(4, 14))).capitalize() + "." for _ in range(40)
        ]
        (folder / f"{number:02}.txt").write_text("\n\n".join(sentences))
    return folder


@dataclass
class Workshop:
    """Runs `bestiary pretrain` on the small corpus, with a compilation cache so that each program is compiled once."""

    folder: Path

    def arguments(self, out: Path, *more: str, **settings: str | None) -> list[str]:
        """The command's words; `settings` replace the usual flags, None leaves one out."""
        flags = {
            "corpus": str(self.folder / "corpus"), "cache": str(self.folder / "cache"), "vocab_size": "200",
            "model": "bert-tiny", "sequence_length": "32", "batch_tokens": "512", "steps": str(STEPS),
            "log_every": "4", "evaluate_every": "8", "checkpoint_every": "5", "evaluation_rows": "32", "out": str(out),
        } | settings  # fmt: skip
        pairs = ((f"--{name.replace('_', '-')}", value) for name, value in flags.items() if value is not None)
        return ["pretrain", *(word for pair in pairs for word in pair), *more]

    def start(self, *arguments: str, devices: int = 1) -> subprocess.Popen[str]:
        environment = {
            **os.environ,
            "JAX_NUM_CPU_DEVICES": str(devices),
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        command = [sys.executable, "-c", MAIN, *arguments]
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def run(self, *arguments: str, devices: int = 1) -> tuple[int, str]:
        """(exit status, what was said)."""
        process = self.start(*arguments, devices=devices)
        said = process.communicate(timeout=300)[1]
        return process.returncode, said

    def pretrain(self, out: Path, *more: str, devices: int = 1, **settings: str | None) -> str:
        """Run to the end; what was said."""
        status, said = self.run(*self.arguments(out, *more, **settings), devices=devices)
        assert status == 0, said
        return said


@pytest.fixture(scope="session")
def workshop(tmp_path_factory) -> Workshop:
    folder = tmp_path_factory.mktemp("workshop")
    write_corpus(folder / "corpus")
    return Workshop(folder)


@pytest.fixture(scope="session")
def uninterrupted(workshop) -> Path:
    """The folder of a run that nothing disturbed."""
    workshop.pretrain(workshop.folder / "uninterrupted")
    return workshop.folder / "uninterrupted"
