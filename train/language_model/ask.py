"""Let a language model do a task by prompts: with examples in them ("few-shot") or without.

bestiary ask --model gpt2 --task sst2 --data glue/SST-2 --shots 4
bestiary ask --model gpt2 --task codah --data codah/full_data.tsv --by per-token
bestiary ask --model gpt2 --task squad --data dev-v1.1.json --train train-v1.1.json --shots 1
bestiary ask --model t5 --task translation --data pairs.tsv --prompt "translate English to German: {first}"

Brown et al. 2020, 2.4: each example is asked after K examples with their answers, drawn from the training set. The
answer is the candidate that the model finds most likely, or what it generates.
"""

import dataclasses
import json as json_text
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ...data.files import write_text
from ...data.progress import counted
from ...data.random import RandomStream
from ..errors import RunError, check_setting
from ..progress import Progress

if TYPE_CHECKING:
    from .asked_tasks import AskedTask, Item
    from .model import LanguageModel

TASKS = Literal[
    "cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli", "swag", "codah", "squad", "translation",
    "classification",
]  # fmt: skip
By = Literal["likelihood", "per-token", "calibrated", "generation"]
FREE = ("squad", "translation")  # answers are texts, and no candidates
BETWEEN = "\n\n"  # after each example that is shown


@dataclass(frozen=True)
class AskConfig:
    """Let a language model do a task by prompts, and compute the official metrics."""

    model: Path
    """Checkpoint folder of a language model (GPT-2, ...) or an encoder-decoder (T5, BART), whose source is the prompt,
    with its tokenizer; or run folder."""
    task: TASKS
    """The task: one of GLUE, swag, codah, squad, translation, or classification, for a table of your own."""
    data: Path
    """Data of the task, as for `bestiary finetune`: GLUE's folder, the folder or file of SWAG or CODAH, SQuAD's file to
    answer, a table (.tsv, .csv, .jsonl), or the texts to translate, one per line."""
    target: Path | None = None
    """Of translation: file of the translations of --data's lines. None: --data holds both, as the columns of a .tsv or
    the fields --text and --label of JSON lines."""
    train_target: Path | None = None
    """The same for --train."""
    train: Path | None = None
    """Examples to show: SQuAD's training file, or a table. None: the training split in --data; of CODAH's single file,
    all folds but the first, which is answered."""
    split: str = "dev"
    """Split to answer, if --data is a folder."""
    shots: int = 0
    """Number of examples to show before each question, chosen at random for each question."""
    by: By | None = None
    """How answers are found. likelihood: the candidate of the highest probability; per-token: its logarithm divided by
    the candidate's number of tokens; calibrated: divided by its probability without the question (Brown et al. 2020,
    2.4); generation: what the model generates up to the end of the line. None: generation for squad and translation,
    else likelihood."""
    prompt: str | None = None
    """Prompt instead of the task's own, with {first} and {second} for an example's texts. An example is never shown
    before the same prompt."""
    answers: tuple[str, ...] = ()
    """Words of the answers instead of the task's own, in the order of the classes."""
    text: str = "sentence"
    """Of a table: column of the text, or of the first text of a pair."""
    text_pair: str | None = None
    """Of a table: column of the second text of a pair."""
    label: str = "label"
    """Of a table: column of the label."""
    seed: int = 0
    """Seed of the examples that are shown."""
    limit: int = 0
    """Answer only the first N examples; 0: all."""
    batch: int = 16
    """Prompts computed together."""
    out: Path | None = None
    """JSON file for the results, with every answer."""
    json: bool = False
    """Print one JSON object instead of text."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the computation."""

    def __post_init__(self) -> None:
        for name, least in (("shots", 0), ("seed", 0), ("limit", 0), ("batch", 1)):
            check_setting(self, name, least=least)
        if self.task in FREE and self.by not in (None, "generation"):
            raise RunError(f"--by {self.by}: answers of {self.task} are generated; it has no candidates.")
        if self.task != "translation" and (self.target or self.train_target) is not None:
            raise RunError(f"--target and --train-target are for translation, found --task {self.task}.")
        if self.train_target is not None and self.train is None:
            raise RunError("--train-target: it holds the translations of --train, which is missing.")
        if self.prompt is not None and "{first}" not in self.prompt:
            raise RunError("--prompt: expected {first}, where an example's text goes.")
        if self.out is not None and not self.out.absolute().parent.is_dir():
            raise RunError(f"--out {self.out}: there is no folder {self.out.absolute().parent}.")


def with_shots(task: "AskedTask", number: int, shots: int, seed: int) -> str:
    """Return the prompt of an item after examples, which depend only on the seed and the item's number.

    An example with the item's own prompt is not shown: it would tell the answer.

    Raises:
        RunError: there are not as many examples.
    """
    item = task.items[number]
    usable = len(task.shown)
    if shots > usable:
        raise RunError(f"--shots {shots}: there are {counted(usable, 'example')} to show. Give more with --train.")
    order = RandomStream(seed, number).permutation(usable) if shots else []
    examples = list(islice((task.shown[i] for i in order if task.shown[i].prompt != item.prompt), shots))
    if len(examples) < shots:
        raise RunError(
            f"--shots {shots}: there are {counted(len(examples), 'example')} to show before example {item.key}, whose "
            "own prompt is not shown. Give more with --train."
        )
    parts = [f"{shot.prompt}{shot.answers[shot.right or 0]}{BETWEEN}" for shot in examples]
    return "".join(parts) + item.prompt


def encode(
    language_model: "LanguageModel", prompts: Sequence[str], names: Sequence[str], shots: int, longest: int
) -> list[list[int]]:
    """Return the prompts' tokens.

    Args:
        language_model: the model.
        prompts: the prompts.
        names: what each is, for messages.
        shots: number of examples in each, for messages.
        longest: number of tokens to leave room for after each.

    Raises:
        RunError: a prompt does not fit, or is empty although the model has no token that begins a text.
    """
    found = language_model.encode(prompts)
    first = language_model.first_id
    found = [ids or ([] if first is None else [first]) for ids in found]
    for name, ids in zip(names, found, strict=True):
        if not ids:
            raise RunError(f"{name} is empty, and the model has no token that begins a text.")
        if not language_model.fits(len(ids), longest):
            raise RunError(
                f"{name} with {counted(shots, 'shot')} takes {len(ids):,} tokens, and "
                f"{longest} more are needed for an answer; the model has {language_model.positions:,} positions. Give "
                "fewer --shots."
            )
    return found


def prompt_names(task: "AskedTask") -> list[str]:
    """Return what the task's prompts are, for messages."""
    return [f"example {item.key}: its prompt" for item in task.items]


def encode_answers(language_model: "LanguageModel", item: "Item", *, common: bool) -> list[list[int]]:
    """Return the tokens of an example's candidates.

    Args:
        language_model: the model.
        item: the example.
        common: whether all examples have these candidates, for messages.

    Raises:
        RunError: one has no tokens, or two have the same.
    """
    answers = item.answers
    where, advice = ("", "; give other --answers.") if common else (f"example {item.key}: ", ".")
    found = language_model.encode_answers(answers)
    for number, ids in enumerate(found):
        if not ids:
            raise RunError(f"{where}the answer {answers[number]!r} has no tokens{advice}")
        if ids in found[:number]:
            other = answers[found.index(ids)]
            same = f"the answers {other!r} and {answers[number]!r} have the same tokens"
            raise RunError(f"{where}{same}{advice}")
    return found


def by_likelihood(
    language_model: "LanguageModel", task: "AskedTask", prompts: Sequence[str], config: AskConfig, progress: Progress
) -> list[np.ndarray]:
    """Return each item's log probabilities of its candidates, as `config.by` compares them."""
    cache: dict[tuple[str, ...], list[list[int]]] = {}
    candidates = []
    for item in task.items:
        if item.answers not in cache:
            cache[item.answers] = encode_answers(language_model, item, common=task.template.answers is not None)
        candidates.append(cache[item.answers])
    longest = max(len(answer) for answers in candidates for answer in answers)
    encoded = encode(language_model, prompts, prompt_names(task), config.shots, longest)
    found = _log_probabilities(language_model, encoded, candidates, config.batch, progress)
    if config.by == "per-token":
        return [some / [len(a) for a in answers] for some, answers in zip(found, candidates, strict=True)]
    if config.by == "calibrated":
        name = "--by calibrated: the prompt's last line"
        (context,) = encode(language_model, [task.template.context], [name], 0, longest)
        alone = _log_probabilities(language_model, [context] * len(candidates), candidates, config.batch, progress)
        return [some - other for some, other in zip(found, alone, strict=True)]
    return found


def _log_probabilities(
    language_model: "LanguageModel",
    prompts: Sequence[Sequence[int]],
    candidates: Sequence[Sequence[Sequence[int]]],
    batch: int,
    progress: Progress,
) -> list[np.ndarray]:
    """Return log p of each prompt's candidates; the same text is computed once."""
    texts: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
    for prompt, answers in zip(prompts, candidates, strict=True):
        for answer in answers:
            texts.setdefault((tuple(prompt), tuple(answer)), len(texts))
    found = np.zeros(len(texts))
    keys = list(texts)
    for done, (i, losses) in enumerate(language_model.answer_losses(keys, batch), 1):
        found[i] = -losses.sum(dtype=np.float64)
        progress.update(f"{done:,} of {len(keys):,} answers")
    return [
        np.array([found[texts[tuple(prompt), tuple(answer)]] for answer in answers])
        for prompt, answers in zip(prompts, candidates, strict=True)
    ]


def by_generation(
    language_model: "LanguageModel", task: "AskedTask", prompts: Sequence[str], config: AskConfig, progress: Progress
) -> list[str]:
    """Return what the model generates after each prompt, up to the end of the line."""
    from ...data.tokenizers.text_stream import TextStream
    from ..generate.config import DecodeConfig
    from ..generate.generator import Generator, Watch

    longest = task.longest
    if not task.free:  # room for every candidate, and the end of the line
        answers = sorted({answer for item in task.items for answer in item.answers})
        longest = max(longest, 1 + max(map(len, language_model.encode_answers(answers))))
    encoded = encode(language_model, prompts, prompt_names(task), config.shots, longest)
    streams = [TextStream(language_model.tokenizer, language_model.begun(ids), ("\n",)) for ids in encoded]
    finished = 0

    def seen(number: int, tokens: list[int], ended: bool) -> bool:
        nonlocal finished
        streams[number].push(tokens)
        if ended:
            streams[number].finish()
        if ended or streams[number].stopped:
            finished += 1
            progress.update(f"{finished:,} of {len(encoded):,} answers")
        return streams[number].stopped

    decode = DecodeConfig(max_length=longest)
    Generator(language_model.model, language_model.params, decode, rows=config.batch)(encoded, watch=Watch(seen, 8))
    return [stream.text.strip() for stream in streams]


def matched(text: str, item: "Item") -> int | None:
    """Return the number of the longest candidate whose words a generated text begins with; None if there is none."""
    told = text.strip().lower()

    def begins(answer: str) -> bool:
        end = len(answer)
        return told.startswith(answer) and not (answer[-1:].isalnum() and told[end : end + 1].isalnum())

    fits = [i for i, answer in enumerate(item.answers) if begins(answer.strip().lower())]
    return max(fits, key=lambda i: len(item.answers[i]), default=None)


def answer(
    language_model: "LanguageModel", task: "AskedTask", config: AskConfig, progress: Progress
) -> tuple[list[Any], dict[str, int]]:
    """Return the predictions of all items, and counts of what was unusual."""
    prompts = [with_shots(task, number, config.shots, config.seed) for number in range(len(task.items))]
    if config.by != "generation":
        scores = by_likelihood(language_model, task, prompts, config, progress)
        if task.values:  # the candidates' numbers are values: their mean
            shares = [np.exp(some - some.max()) for some in scores]
            return [float(share @ np.arange(len(share)) / share.sum()) for share in shares], {}
        return [int(some.argmax()) for some in scores], {}
    texts = by_generation(language_model, task, prompts, config, progress)
    if task.free:
        return texts, {}
    found = [matched(text, item) for text, item in zip(texts, task.items, strict=True)]
    # An answer that is none of the candidates is wrong, whichever is right; of values, it tells nothing.
    wrong = [((item.right or 0) + 1) % len(item.answers) for item in task.items]
    instead = task.baseline if task.values else wrong
    counts = {"answers_outside": sum(choice is None for choice in found)}
    return [other if choice is None else choice for choice, other in zip(found, instead, strict=True)], counts


def main(config: AskConfig) -> int:
    """Run `bestiary ask`; return the exit status."""
    from .asked_tasks import asked_task, default_template
    from .model import open_language_model

    config = dataclasses.replace(config, by=config.by or ("generation" if config.task in FREE else "likelihood"))
    template = default_template(config.task, config.text_pair is not None)
    if config.prompt is not None:
        if "{second}" in template.prompt and "{second}" not in config.prompt:
            raise RunError("--prompt: expected {second} too, where an example's second text goes.")
        template = template._replace(prompt=config.prompt)
    if config.answers:
        count = None if template.answers is None else len(template.answers)
        if config.task in ("swag", "codah", *FREE) or count not in (None, len(config.answers)):
            expected = "its answers are in the data" if count is None else f"expected {count}"
            raise RunError(f"--answers: {config.task}: {expected}, found {len(config.answers)}.")
        template = template._replace(answers=tuple(f" {word.strip()}" for word in config.answers))
    columns = {"text": config.text, "text_pair": config.text_pair, "label": config.label}
    columns |= {"target": config.target, "train_target": config.train_target} if config.task == "translation" else {}
    task = asked_task(config.task, config.data, config.train, config.split, config.limit or None, template, columns)
    language_model, progress = open_language_model(config.model, config.dtype, encoder_decoder=True), Progress()
    predictions, counts = answer(language_model, task, config, progress)
    results = {
        "task": config.task,
        "by": config.by,
        "shots": config.shots,
        "examples": len(task.items),
        **counts,
        "metrics": task.metrics(predictions),
        "baseline": task.metrics(task.baseline),
    }
    if config.out is not None:
        answers = {item.key: prediction for item, prediction in zip(task.items, predictions, strict=True)}
        write_text(config.out, json_text.dumps({**results, "answers": answers}, indent=2, ensure_ascii=False) + "\n")
    print(json_text.dumps(results, indent=2) if config.json else "\n".join(described(results, values=task.values)))
    return 0


def described(results: Mapping[str, Any], *, values: bool) -> list[str]:
    """Return the lines that show results, with the baseline beside them; `values`: see `AskedTask`."""
    lines = [
        f"{results['task']}: {counted(results['examples'], 'example')}, {counted(results['shots'], 'shot')}, "
        f"by {results['by']}"
    ]
    if results.get("answers_outside"):
        instead = "the mean" if values else "wrong"
        lines.append(f"{results['answers_outside']:,} answers were none of the candidates, which counts as {instead}")
    width = max(map(len, results["metrics"]))
    lines.append(f"{'':<{width}}  {'model':>8}  {'baseline':>8}")
    for name, value in results["metrics"].items():
        lines.append(f"{name:<{width}}  {value:8.4f}  {results['baseline'].get(name, 0):8.4f}")
    return lines
