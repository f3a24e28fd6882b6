"""Continue texts with a language model.

bestiary generate --model gpt2 --prompt "The sea" --top-p 0.95
bestiary generate --model runs/books --beam 4 --max-length 40 < prompts.txt > continuations.txt
"""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from ...data.progress import counted
from ..arguments import flags
from ..errors import RunError, check_setting, check_text
from ..generate.config import DecodeConfig
from ..generate.lines import Lines
from ..progress import Progress

if TYPE_CHECKING:
    from ..generate.generator import Hypothesis
    from .model import LanguageModel

EVERY = 16  # steps between looking for stop strings in outputs that nobody is watching
SAMPLING = ("temperature", "top_k", "top_p", "seed")


@dataclass(frozen=True)
class PromptDecodeConfig(DecodeConfig):
    """Options of text generation; options of sampling that differ from their defaults imply --sample."""

    def __post_init__(self) -> None:
        if any(getattr(self, name) != getattr(DecodeConfig, name) for name in SAMPLING):
            object.__setattr__(self, "sample", True)
        super().__post_init__()


@dataclass(frozen=True)
class GenerateConfig:
    """Continue texts: those of --prompt, or else the lines of standard input."""

    model: Path
    """Checkpoint folder of a language model (GPT-2, ...) with its tokenizer, or run folder."""
    prompt: tuple[str, ...] = ()
    """Texts to continue. A single output is shown as it grows. An empty text begins with the model's own beginning of a
    text."""
    decode: Annotated[PromptDecodeConfig, tyro.conf.arg(name="")] = PromptDecodeConfig()
    stop: tuple[str, ...] = ()
    """Strings that end an output, and are not part of it."""
    too_long: Literal["refuse", "cut"] = "refuse"
    """Handling of a prompt that leaves no room for --max-length tokens more in the model's positions: refuse it, or cut
    its beginning, which is reported."""
    json: bool = False
    """Print a JSON object per output: prompt, text, tokens (number of tokens), score (log probability, divided by the
    length penalty) and ended (by `end`, the model's end of text; `stop`; or `length`). With beams or several samples,
    tokens and score are of the output before the cut at --stop; else up to the token that completes that string."""
    batch: int = 16
    """Number of prompts that are continued together."""
    window: int = 256
    """Maximum number of lines of standard input to read before writing their outputs."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the computation."""

    def __post_init__(self) -> None:
        check_text("--prompt", self.prompt)
        check_text("--stop", self.stop)
        check_setting(self, "batch", least=1)
        check_setting(self, "window", least=1)
        if "" in self.stop:
            raise RunError("--stop: an empty string would end every output at once.")

    @staticmethod
    def check_arguments(arguments: Sequence[str]) -> None:
        """Refuse --no-sample together with options of sampling."""
        given = flags(arguments)
        asked = [name for name in SAMPLING if name in given]
        if "no_sample" in given and asked:
            raise RunError(f"--no-sample: leave --{asked[0].replace('_', '-')} out, which is for sampling.")


class Output:
    """One continuation of a prompt, as text."""

    def __init__(self, prompt: str, text: str, hypothesis: "Hypothesis", ended: str):
        self.prompt, self.text, self.ended = prompt, text, ended
        self.tokens, self.score = len(hypothesis.tokens), hypothesis.score

    def json(self) -> str:
        """Return the output as one line of JSON."""
        return json.dumps(vars(self), ensure_ascii=False)


class Continuer:
    """Continue prompts with one model.

    Args:
        language_model: the model.
        config: options.
        rows: number of prompts continued together.
    """

    def __init__(self, language_model: "LanguageModel", config: GenerateConfig, rows: int):
        from ..generate.generator import Generator

        self._lm, self._config = language_model, config
        self._generate = Generator(language_model.model, language_model.params, config.decode, rows=rows)
        self.done = self.cut = 0

    def prepare(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of prompts, in their order, cut at the beginning if they must be and may be.

        Raises:
            RunError: a prompt is too long, or empty although the model has no token that begins a text.
        """
        found = []
        for number, ids in enumerate(self._lm.encode(texts), self.done + 1):
            if not ids:
                if self._lm.first_id is None:
                    raise RunError(f"prompt {number}: empty, and the model has no token that begins a text.")
                ids = [self._lm.first_id]
            positions, longest = self._lm.positions, self._config.decode.max_length
            if positions is not None and len(ids) + longest > positions:
                if self._config.too_long == "refuse" or longest >= positions:
                    raise RunError(
                        f"prompt {number}: {len(ids)} tokens and --max-length {longest} more do not fit the model's "
                        f"{positions} positions. Give a smaller --max-length, or --too-long cut."
                    )
                ids = ids[len(ids) + longest - positions :]
                self.cut += 1
            found.append(ids)
        return found

    def outputs(self, texts: Sequence[str], *, show: bool = False) -> Iterator[list[Output]]:
        """Yield the outputs of each prompt; with `show`, write the only one's text as it grows."""
        from ...data.tokenizers.text_stream import TextStream
        from ..generate.generator import Watch

        prompts = self.prepare(texts)
        stop = self._config.stop
        watched = self._config.decode.width == 1 and (show or bool(stop))
        streams = [TextStream(self._lm.tokenizer, ids, stop) for ids in prompts]

        def seen(number: int, tokens: list[int], finished: bool) -> bool:
            stream = streams[number]
            new = stream.push(tokens) + (stream.finish() if finished or stream.stopped else "")
            if show and new:
                sys.stdout.write(new)
                sys.stdout.flush()
            return stream.stopped

        watch = Watch(seen, 1 if show or self._config.json else EVERY) if watched else None
        found = self._generate(prompts, first=self.done, watch=watch)
        self.done += len(texts)
        for text, ids, hypotheses, stream in zip(texts, prompts, found, streams, strict=True):
            outputs = []
            for hypothesis in hypotheses:
                own = stream
                if not watched:
                    own = TextStream(self._lm.tokenizer, ids, stop)
                    own.push(hypothesis.tokens)
                    own.finish()
                whole = len(hypothesis.tokens) == self._config.decode.max_length
                ended = "stop" if own.stopped else "length" if whole else "end"
                outputs.append(Output(text, own.text, hypothesis, ended))
            yield outputs


def main(config: GenerateConfig) -> int:
    """Run `bestiary generate`; return the exit status."""
    from .model import open_language_model

    progress = Progress()
    language_model = open_language_model(config.model, config.dtype)
    rows = min(config.batch, len(config.prompt)) if config.prompt else config.batch
    continuer = Continuer(language_model, config, rows)
    alone = len(config.prompt) == 1 and config.decode.width == 1 and not config.json
    windows: Any = [list(config.prompt)] if config.prompt else Lines(sys.stdin.buffer, config.window)
    for texts in windows:
        if not config.prompt and continuer.done:
            progress.update(f"{counted(continuer.done, 'prompt')} continued")
        for outputs in continuer.outputs(texts, show=alone):
            for output in outputs[: config.decode.n_best]:
                if alone:
                    sys.stdout.write("\n")
                else:
                    line = output.json() if config.json else one_line(output.text)
                    sys.stdout.write(f"{line}\n")
        sys.stdout.flush()
    if not config.prompt:
        progress.line(f"{counted(continuer.done, 'prompt')} continued")
    if continuer.cut:
        progress.line(f"{counted(continuer.cut, 'prompt')} cut at the beginning, to fit the model's positions")
    return 0


def one_line(text: str) -> str:
    """Return a text on one line: line ends become `\\n` and `\\r`, and a backslash becomes two."""
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
