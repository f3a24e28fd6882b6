"""The command line. A command's module is imported only when the command is called."""

import io
import os
import re
import sys
import traceback
from contextlib import redirect_stdout, suppress
from functools import partial
from importlib import import_module
from importlib.metadata import version
from typing import Annotated, Any, NamedTuple

import tyro

from ..data.cloud.mirror import in_urls
from .arguments import did_you_mean, reflow_help, refuse_renamed
from .errors import RunError
from .machine.compiled import keep_compiled_programs
from .machine.cpu import prepare_cpu
from .machine.stores import on_mirrors
from .progress import end_line


class Command(NamedTuple):
    """A command: its config dataclass, as `module:name`; what it does; and the module whose `main(config)` runs it.

    --help imports only the config's module, which therefore should import nothing heavy.
    """

    config: str
    what: str
    runs_in: str | None = None
    """None: the config's module."""
    example: str = ""
    """what --help opens with: lines that run as they stand, from the root of a checkout, one after the other"""
    first: str | None = None
    """values that its first argument may have, if it has subcommands too, as `module:name`"""


# Lines that make what several commands' examples need.
PRETRAINED = "bestiary pretrain\n"
FINETUNED = PRETRAINED + (
    "bestiary finetune sst2 --data docs/examples/SST-2 --model runs/pretrain/model --epochs 1 --out runs/sst2\n"
)
ADAPTED = PRETRAINED + (
    "bestiary finetune sst2 --data docs/examples/SST-2 --model runs/pretrain/model --lora-rank 4 --epochs 1 "
    "--out runs/lora\n"
)
TRANSLATED = "bestiary translate train\n"
REWRITING = TRANSLATED + (
    "bestiary text2text train --train docs/examples/pairs.tsv --model runs/translate/model --steps 10\n"
)
CAUSAL = "bestiary pretrain --model gpt2-tiny --steps 20 --out runs/gpt2-tiny\n"
SHAPES = (
    "bestiary images train --data docs/examples/shapes --image-size 28 --patch-size 7 --width 32 --layers 2 --heads 2 "
    "--batch-size 8 --epochs 2 --out runs/shapes\n"
)
SEVERAL = "bestiary multitask train --config docs/examples/tasks.toml --batch-size 8 --steps 20 --out runs/unit\n"
VECTORS = "bestiary words train --corpus embedded:python --epochs 1 --out vectors.txt\n"

COMMANDS: dict[tuple[str, ...], Command] = {
    ("pretrain",): Command(
        ".pretrain.config:PretrainConfig",
        "pretrain a model on text; without arguments, a small ModernBERT on Python's own documentation",
        ".pretrain.loop",
        example=PRETRAINED,
    ),
    ("distill",): Command(
        ".pretrain.config:DistillConfig",
        "distil a masked language model into a smaller one, on text",
        ".pretrain.loop",
        example=PRETRAINED + "bestiary distill --teacher runs/pretrain/model --steps 20",
    ),
    ("translate", "train"): Command(
        ".translate.config:TranslateConfig",
        "train a translator; without arguments, on built-in English-German phrases",
        ".translate.train",
        example=TRANSLATED,
    ),
    ("translate", "run"): Command(
        ".translate.run:RunConfig",
        "translate lines of text; --attention draws attention maps",
        example=TRANSLATED + "bestiary translate run --model runs/translate < docs/examples/english.txt",
    ),
    ("translate", "score"): Command(
        ".translate.score:ScoreConfig",
        "score translations: BLEU and chrF by sacreBLEU, and tokenised BLEU",
        example=TRANSLATED
        + "bestiary translate score --model runs/translate --source docs/examples/english.txt --reference "
        "docs/examples/german.txt",
    ),
    ("generate",): Command(
        ".language_model.generate:GenerateConfig",
        "continue texts with a language model",
        example=CAUSAL + 'bestiary generate --model runs/gpt2-tiny --prompt "The" --max-length 20',
    ),
    ("perplexity",): Command(
        ".language_model.perplexity:PerplexityConfig",
        "measure how well a language model predicts a text: per token, word and character",
        example=CAUSAL + "bestiary perplexity --model runs/gpt2-tiny --text CONTRIBUTING.md",
    ),
    ("ask",): Command(
        ".language_model.ask:AskConfig",
        "let a language model do tasks by prompts, with examples in them or without",
        example=CAUSAL + "bestiary ask --model runs/gpt2-tiny --task sst2 --data docs/examples/SST-2 --shots 1",
    ),
    ("text2text", "train"): Command(
        ".text2text.config:Text2TextConfig",
        "train T5, BART or the like on pairs of texts: summaries, rewriting, GLUE as text",
        ".text2text.train",
        example=REWRITING,
    ),
    ("text2text", "run"): Command(
        ".text2text.run:Text2TextRun",
        "write an output for each line of text",
        example=REWRITING + "bestiary text2text run --model runs/text2text < docs/examples/english.txt",
    ),
    ("text2text", "score"): Command(
        ".text2text.score:Text2TextScore",
        "score outputs: ROUGE, BLEU and chrF by sacreBLEU, or exact matches",
        example="bestiary text2text score --metric exact --hypothesis docs/examples/german.txt --reference "
        "docs/examples/german.txt",
    ),
    ("tokenizer", "train"): Command(
        ".commands.tokenizer:TokenizerConfig",
        "train a tokenizer on a corpus",
        example="bestiary tokenizer train --kind wordpiece --vocab-size 1000 --corpus README.md --out "
        "tokenizers/readme",
    ),
    ("plan",): Command(
        ".plan.config:PlanConfig",
        "plan a training command for TPUs or GPUs that are not here: memory, operations, collectives, speed",
        example="bestiary plan pretrain --model bert-tiny --batch-tokens 65536 --target v5e:2x2",
    ),
    ("finetune",): Command(
        ".finetune.commands.glue:GlueConfig",
        "fine-tune on a GLUE task: cola, mrpc, mnli, ...",
        first="..data.tasks.glue:FINETUNED",
        example=FINETUNED,
    ),
    ("finetune", "glue"): Command(
        ".finetune.commands.glue_suite:GlueSuiteConfig",
        "fine-tune on several GLUE tasks and write one table",
        example=PRETRAINED
        + "bestiary finetune glue --tasks sst2 --data docs/examples --model runs/pretrain/model --epochs 1 "
        "--out runs/glue",
    ),
    ("finetune", "glue", "--as-text"): Command(
        ".text2text.config:GlueTextConfig",
        "the same with T5, BART or the like, as text to text",
        ".text2text.glue",
        example=TRANSLATED
        + "bestiary finetune glue --as-text --tasks sst2 --data docs/examples --model runs/translate/model --steps 2 "
        "--out runs/as-text",
    ),
    ("finetune", "classification"): Command(
        ".finetune.commands.table:TableConfig",
        "fine-tune on your own table: classify or score texts or pairs of texts",
        example=PRETRAINED + "bestiary finetune classification --train docs/examples/SST-2/train.tsv --dev "
        "docs/examples/SST-2/dev.tsv --text sentence --label label --model runs/pretrain/model --epochs 1 "
        "--out runs/table",
    ),
    ("finetune", "squad"): Command(
        ".finetune.commands.squad:SquadConfig",
        "fine-tune on extractive question answering: SQuAD 1.1 and 2.0",
        example=PRETRAINED + "bestiary finetune squad --data docs/examples/questions.json --eval-data "
        "docs/examples/questions.json --model runs/pretrain/model --max-length 64 --doc-stride 16 "
        "--max-question 16 --out runs/squad",
    ),
    ("finetune", "swag"): Command(
        ".finetune.commands.choice:SwagConfig",
        "fine-tune on multiple choice: SWAG",
        example=PRETRAINED
        + "bestiary finetune swag --data docs/examples/swag --model runs/pretrain/model --out runs/swag",
    ),
    ("finetune", "codah"): Command(
        ".finetune.commands.choice:CodahConfig",
        "fine-tune on multiple choice: CODAH",
        example=PRETRAINED + "bestiary finetune codah --data docs/examples/codah.tsv --model runs/pretrain/model --out "
        "runs/codah",
    ),
    ("finetune", "ner"): Command(
        ".finetune.commands.tagging:NerConfig",
        "fine-tune on named entities in CoNLL columns; --crf adds a CRF",
        example=PRETRAINED + "bestiary finetune ner --data docs/examples/names --model runs/pretrain/model --crf --out "
        "runs/ner",
    ),
    ("finetune", "pos"): Command(
        ".finetune.commands.tagging:PosConfig",
        "fine-tune on parts of speech in CoNLL-U",
        example=PRETRAINED
        + "bestiary finetune pos --data docs/examples/tags --model runs/pretrain/model --out runs/pos",
    ),
    ("images", "train"): Command(
        ".images.config:TrainConfig",
        "train an image classifier from scratch: MNIST, CIFAR, your own folders",
        ".images.loop",
        example=SHAPES,
    ),
    ("images", "finetune"): Command(
        ".images.config:FinetuneConfig",
        "fine-tune an image classifier from a checkpoint",
        ".images.loop",
        example=SHAPES
        + "bestiary images finetune --data docs/examples/shapes --model runs/shapes/model --batch-size 8 "
        "--steps 2 --out runs/shapes-again",
    ),
    ("images", "embed"): Command(
        ".images.config:EmbedConfig",
        "compute vectors of images from any layers of an encoder",
        ".images.embed",
        example=SHAPES + "bestiary images embed runs/shapes/model docs/examples/shapes/circle --out vectors.npy",
    ),
    ("images", "predict"): Command(
        ".images.config:PredictConfig",
        "predict the classes of images",
        ".images.predict",
        example=SHAPES + "bestiary images predict runs/shapes docs/examples/shapes/circle/0.png",
    ),
    ("multitask", "train"): Command(
        ".multitask.config:TrainConfig",
        "train one model for several tasks of images, texts and questions about images (UniT)",
        ".multitask.loop",
        example=SEVERAL,
    ),
    ("multitask", "predict"): Command(
        ".multitask.config:PredictConfig",
        "answer one of the tasks of such a model",
        ".multitask.predict",
        example=SEVERAL + "bestiary multitask predict runs/unit --task vqa --image docs/examples/shapes/circle/0.png "
        '--question "what shape is it?"',
    ),
    ("evaluate",): Command(
        ".finetune.evaluate:EvaluateConfig",
        "evaluate a fine-tuned model on labelled examples",
        example=FINETUNED + "bestiary evaluate runs/sst2 --data docs/examples/SST-2",
    ),
    ("predict",): Command(
        ".finetune.predict:PredictConfig",
        "predict new examples with a fine-tuned model",
        example=FINETUNED + 'bestiary predict runs/sst2 --text "a joy from beginning to end"',
    ),
    ("embed",): Command(
        ".embed.config:EmbedConfig",
        "compute vectors of sentences or tokens with a pretrained encoder",
        ".embed.embed",
        example=PRETRAINED + "bestiary embed --model runs/pretrain/model --out vectors.npy < docs/examples/english.txt",
    ),
    ("attention",): Command(
        ".embed.config:AttentionConfig",
        "draw or store what tokens attend to in a pretrained encoder",
        ".embed.attention",
        example=PRETRAINED + 'bestiary attention "The cat sat on the mat." --model runs/pretrain/model --out page.html',
    ),
    ("probe",): Command(
        ".embed.config:ProbeConfig",
        "train a linear head on a pretrained encoder's features",
        ".embed.probe",
        example=PRETRAINED + "bestiary probe --task sst2 --data docs/examples/SST-2 --model runs/pretrain/model",
    ),
    ("words", "train"): Command(
        ".words.config:WordsConfig",
        "train word vectors on a corpus: word2vec's skip-gram and CBOW",
        ".words.train",
        example=VECTORS,
    ),
    ("words", "nearest"): Command(
        ".words.config:NearestConfig",
        "list or draw the words nearest to a word",
        ".words.nearest",
        example=VECTORS + "bestiary words nearest vectors.txt list tuple --plot map.png",
    ),
    ("words", "evaluate"): Command(
        ".words.config:EvaluateConfig",
        "evaluate word vectors by similarities and analogies",
        ".words.evaluate",
        example=VECTORS + "bestiary words evaluate vectors.txt --similarities docs/examples/similarities.tsv",
    ),
    ("models",): Command(
        ".commands.zoo:ModelsConfig",
        "list the model families: sizes, parameters, heads, objectives, tokenizer, paper",
        example="bestiary models",
    ),
    ("models", "show"): Command(
        ".commands.zoo:ShowConfig",
        "list the parameters of one size: shapes, logical axes, bytes",
        example="bestiary models show bert-base",
    ),
    ("adapter", "merge"): Command(
        ".commands.adapter:MergeConfig",
        "merge an adapter saved by peft into its model",
        example=ADAPTED + "bestiary adapter merge runs/pretrain/model runs/lora/adapter --out merged",
    ),
    ("adapter", "load"): Command(
        ".commands.adapter:LoadConfig",
        "check that an adapter saved by peft fits a model, and list it",
        example=ADAPTED + "bestiary adapter load runs/pretrain/model runs/lora/adapter",
    ),
    ("parity",): Command(
        ".commands.parity:ParityConfig",
        "compare outputs, losses and gradients with fixtures of the reference implementation",
        example="bestiary parity tests/models/fixtures/bert_model",
    ),
    ("report",): Command(
        ".commands.report:ReportConfig",
        "write one page of one run or several: curves, settings, results, samples",
        example=PRETRAINED + "bestiary report runs/pretrain --out report.html",
    ),
    ("bench", "pretrain"): Command(
        ".bench.config:PretrainBenchConfig",
        "measure pretraining: real tokens/s, loss, fraction of the matmul rate, data pipeline",
        ".bench.pretrain",
        example="bestiary bench pretrain --model bert-tiny --sequence-length 128 --steps 12 --skip 4",
    ),
    ("bench", "translate"): Command(
        ".bench.config:TranslateBenchConfig",
        "measure translation: target tokens/s in training, sentences/s in decoding",
        ".bench.translate",
        example=TRANSLATED
        + "bestiary bench translate --model runs/translate --test docs/examples/english.txt --limit 4",
    ),
    ("bench", "attention"): Command(
        "..kernels.bench.config:AttentionBenchConfig",
        "measure attention kernels and other implementations, or --tune block sizes",
        "..kernels.bench.attention",
        example="bestiary bench attention --shapes 1x128x2x64 --out runs/bench",
    ),
    ("bench", "layers"): Command(
        "..kernels.bench.config:LayersBenchConfig",
        "measure self-attention, recurrent and convolutional layers by sequence length",
        "..kernels.bench.layers",
        example="bestiary bench layers --lengths 64 --tokens 256 --width 64 --samples 3 --out runs/bench",
    ),
}


def opening(words: tuple[str, ...]) -> str:
    """Return what a command's --help opens with: its example, with long lines broken before flags."""
    shown = []
    for line in COMMANDS[words].example.splitlines():
        parts = [""]
        for part in re.split(r" (?=--|<)", line):
            if parts[-1] and len(parts[-1]) + len(part) > 76:
                parts.append(f"    {part}")
            else:
                parts[-1] = f"{parts[-1]} {part}" if parts[-1] else part
        shown.append(" \\\n  ".join(parts))
    return "example:\n" + "\n".join(f"  {line}" for line in shown) + "\n"


USAGE = (
    "usage: bestiary COMMAND [OPTIONS]\n\ncommands:\n{commands}\n\nbestiary COMMAND --help lists a command's options;\n"
    "bestiary --completion bash (zsh, tcsh) prints a script that completes them.\n"
)


def usage() -> str:
    """Return the list of commands."""
    width = max(len(" ".join(words)) for words in COMMANDS)
    rows = (f"  {' '.join(words):<{width}}  {command.what}" for words, command in COMMANDS.items())
    return USAGE.format(commands="\n".join(rows))


def main(argv: list[str] | None = None) -> int:
    """Run a command; return the exit status (0 success, 1 failure, 2 invalid command line)."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage(), end="")
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"bestiary {version('bestiary')}")
        return 0
    if arguments[0] == "--completion":
        return _print_completion(arguments[1:])
    arguments = _chosen_by_flag(arguments)
    longest_first = sorted(COMMANDS.items(), key=lambda command: -len(command[0]))
    for words, command in longest_first:
        if tuple(arguments[: len(words)]) == words:
            rest = arguments[len(words) :]
            return _unknown_subcommand(words, rest) or _guarded(words, command, rest)
    asked = " ".join(word for word in arguments[:2] if not word.startswith("-"))
    parts = [" ".join(words) for words in COMMANDS if words[:-1] == (asked,)]
    if parts:
        print(f"bestiary: {asked!r} needs a subcommand: {', '.join(parts)}; see --help of these.", file=sys.stderr)
        return 2
    firsts = {words[0] for words in COMMANDS}
    asked = asked if arguments[0] in firsts else arguments[0]  # else all that follows would be compared, too
    meant = did_you_mean(asked, [" ".join(words) for words in COMMANDS] if arguments[0] in firsts else firsts)
    print(f"bestiary: there is no command {asked!r}.{meant}\n\n{usage()}", end="", file=sys.stderr)
    return 2


def _chosen_by_flag(arguments: list[str]) -> list[str]:
    """Move a flag that is a command's last word, wherever it is given, behind the words before it."""
    for *words, flag in COMMANDS:
        if flag.startswith("-") and arguments[: len(words)] == words and flag in arguments:
            rest = arguments[len(words) :]
            rest.remove(flag)
            return [*words, flag, *rest]
    return arguments


def _print_completion(given: list[str]) -> int:
    """Print the script that completes commands and flags in a shell; return the exit status."""
    from .commands.completion import script

    def help_of(words: tuple[str, ...]) -> str:
        shown = io.StringIO()
        with redirect_stdout(shown), suppress(SystemExit):
            config_of(words, ["--help"])
        return shown.getvalue()

    try:
        whats = {words: command.what for words, command in COMMANDS.items()}
        print(script(given[0] if given else "", whats, help_of, _first_values), flush=True)
    except BrokenPipeError:
        return _closed_pipe()
    except RunError as error:
        print(f"bestiary: {error}", file=sys.stderr)
        return 2
    return 0


def _first_values(words: tuple[str, ...]) -> tuple[str, ...]:
    """Return the values that a command's first argument may have, if it has subcommands too."""
    command = COMMANDS.get(words)
    if command is None or command.first is None:
        return ()
    module, _, name = command.first.partition(":")
    return tuple(getattr(import_module(module, __package__), name))


def _unknown_subcommand(words: tuple[str, ...], rest: list[str]) -> int:
    """Refuse a mistyped subcommand of a command that can also be called by itself; return 2, or 0 if it is none."""
    subcommands = [other[-1] for other in COMMANDS if other[:-1] == words and not other[-1].startswith("-")]
    if not subcommands or not rest or rest[0].startswith("-"):
        return 0
    values = _first_values(words)
    if rest[0] in values:
        return 0
    subcommands = [*values, *subcommands]
    name = " ".join(words)
    meant = did_you_mean(rest[0], subcommands) or f" Expected one of {', '.join(subcommands)}."
    print(f"bestiary {name}: there is no {rest[0]!r}.{meant}", file=sys.stderr)
    return 2


def _guarded(words: tuple[str, ...], command: Command, arguments: list[str]) -> int:
    """Run a command; print any error as a message and return its exit status."""
    try:
        prepare_cpu()
        if words == ("plan",) and not {"-h", "--help"} & set(arguments[:1]):
            with on_mirrors(words, arguments, lambda _: None, reads=False) as local:
                return _plan(local)
        with on_mirrors(words, arguments, partial(_check, words)) as local:
            config = config_of(words, local)
            if words[0] != "bench":  # which measures compiling
                keep_compiled_programs()
            return import_module(command.runs_in or command.config.partition(":")[0], __package__).main(config)
    except KeyboardInterrupt:
        end_line()
        print("bestiary: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return _closed_pipe()
    except (SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a panic of a library in Rust is no Exception
        end_line()
        if os.environ.get(TRACEBACK):
            traceback.print_exc()
        resumes = " ".join(words).startswith(RESUMING)
        print(f"bestiary: {in_urls(in_words(error, resumes=resumes))}", file=sys.stderr)
        return 1


def _closed_pipe() -> int:
    """Return the exit status when nobody reads what is printed, and keep the exit silent about it."""
    sys.stderr.close()
    return 141


def _check(words: tuple[str, ...], arguments: list[str]) -> None:
    """End the process if arguments are not those of a command, before what they name is copied."""
    with suppress(Exception):  # what needs the files is said when they are there
        config_of(words, arguments)


def _plan(arguments: list[str]) -> int:
    """Run `bestiary plan COMMAND`, whose flags are the plan's own and those of the command.

    Raises:
        RunError: there is no such command.
    """
    from .plan.arguments import divide

    own, rest = divide(arguments)
    trains = {words: command for words, command in COMMANDS.items() if " ".join(words).startswith(RESUMING)}
    found = [words for words in trains if tuple(rest[: len(words)]) == words]
    if not found or rest[:2] == ["finetune", "glue"]:
        asked = " ".join(word for word in rest[:2] if not word.startswith("-"))
        if found:
            meant = f" {asked} is several runs: plan one of its tasks, as finetune mrpc."
        elif any(tuple(rest[: len(words)]) == words for words in COMMANDS):
            meant = ""  # a command that is not planned
        else:
            meant = did_you_mean(asked, RESUMING)
        known = f"the commands are {', '.join(RESUMING)}"
        raise RunError(f"bestiary plan COMMAND --target CHIP:TOPOLOGY: {known}.{meant}")
    words = max(found, key=len)
    command, rest = trains[words], rest[len(words) :]
    if {"-h", "--help"} & set(rest):
        config_of(words, ["--help"])
    config = config_of(("plan",), own)
    os.environ["JAX_PLATFORMS"] = "cpu"
    keep_compiled_programs()
    from .plan.plan import Command as Planned
    from .plan.plan import plan

    module, _, attribute = command.config.partition(":")
    options = getattr(import_module(module, __package__), attribute)
    runs_in = import_module(command.runs_in or module, __package__)
    return plan(config, Planned(words, rest, options, lambda given: config_of(words, list(given)), runs_in.main))


TRACEBACK = "BESTIARY_TRACEBACK"
"""Environment variable: if set, errors show where they were raised."""
RESUMING = (
    *("pretrain", "distill", "finetune", "translate train", "text2text train"),
    *("images train", "images finetune", "multitask train"),
)
"""Commands that resume if they are given again."""


def in_words(error: BaseException, *, resumes: bool) -> str:
    """Return the message of an error: the project's own text, or one line for an error of Python or of a library.

    Args:
        error: the error.
        resumes: whether the command resumes if it is given again.
    """
    text = str(error).strip()
    if "No space left on device" in text:
        again = " and give the same command again; it resumes from its newest checkpoint" if resumes else ""
        return f"{text}\nThe disk is full: free some space{again}."
    if type(error).__module__.startswith("bestiary.") or isinstance(error, OSError):
        return text
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text:
        return f"out of memory: {_first_line(text) or 'Python could not allocate more'}"
    return (
        f"unexpected {type(error).__name__}: {_first_line(text) or 'no message'}. "
        f"Set {TRACEBACK}=1 to see where it was raised."
    )


def _first_line(text: str) -> str:
    return text.partition("\n")[0].strip()


def config_of(words: tuple[str, ...], arguments: list[str]) -> Any:
    """Parse a command's arguments into its config dataclass.

    An unknown flag ends the process with status 2. Errors of the config itself are raised.

    Args:
        words: the command, a key of `COMMANDS`.
        arguments: what follows it.
    """
    module, _, name = COMMANDS[words].config.partition(":")
    return _parse(getattr(import_module(module, __package__), name), arguments, " ".join(("bestiary", *words)))


def _parse(options: Any, arguments: list[str], name: str) -> Any:
    refuse_renamed(arguments)
    if {"-h", "--help"} & set(arguments):
        print(opening(tuple(name.split()[1:])))
        reflow_help(options)
    if hasattr(options, "check_arguments"):  # refuses what cannot be seen from the parsed values
        options.check_arguments(arguments)

    # To tyro, a ValueError of a class is a mistake on the command line; one of a function is left to the caller.
    def config(config: Any) -> Any:
        return config

    config.__annotations__ = {"config": Annotated[options, tyro.conf.arg(name="")]}
    config.__doc__ = options.__doc__
    if "defaults" in vars(options):  # which depend on the flags that are given; a subclass has others
        config.__defaults__ = (options.defaults(arguments),)
    return tyro.cli(config, args=arguments, prog=name)
