"""What a plan needs and the command line does not give: data, tokenizers and checkpoints of the right sizes.

Nothing of their contents matters to a compiled program, only sizes: the vocabulary, the length of texts, the number of
classes. Weights are holes of a sparse file, which take no space.
"""

import json
import random
import shutil
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ...data import Corpus, train_tokenizer
from ...data.json_files import write_json
from ...data.tasks.glue import FINETUNED, GLUE
from ...models.registry import presets
from ..arguments import did_you_mean, flags
from ..errors import RunError

WORDS = 400  # different words of the texts
SMALL = 300  # vocabulary of a tokenizer, before it is filled up
CLASSES = 10  # of images


class StandIns:
    """Fill in the arguments of a command.

    Args:
        words: the command, such as ("finetune", "squad").
        arguments: its arguments.
        options: the class of its settings.
        folder: an empty folder to write to.
    """

    def __init__(self, words: tuple[str, ...], arguments: Sequence[str], options: Any, folder: Path):
        self._words, self._options, self._folder = words, options, folder
        self._given = flags(arguments)
        self._before, self._after = [], list(arguments)
        self.remarks: list[str] = []
        draw = random.Random(0)
        letters = "abcdefghijklmnoprstuvwz"
        self._vocabulary = ["".join(draw.choices(letters, k=draw.randint(2, 7))) for _ in range(WORDS)]
        self._draw = draw

    def arguments(self) -> list[str]:
        """Return all arguments of the command.

        Raises:
            RunError: --model is neither a folder nor a size.
        """
        fill: dict[str, Callable[[], None]] = {
            "pretrain": self._pretrain,
            "distill": self._pretrain,
            "finetune": self._finetune,
            "translate": self._translate,
            "text2text": self._text2text,
            "images": self._images,
            "multitask": self._multitask,
        }
        self._add("out", self._folder / "out")
        fill[self._words[0]]()
        return [*self._after, *self._before]

    # --- commands ---

    def _pretrain(self) -> None:
        if "teacher" in self._given or self._words[0] == "distill":
            self._checkpoint("teacher")
        self._add("cache", self._folder / "cache")
        if "corpus" not in self._given:
            documents = (" ".join(self._text(24) + "." for _ in range(8)) for _ in range(64))
            lines = "".join(json.dumps({"text": text}) + "\n" for text in documents)
            self._add("corpus", self._write("corpus.jsonl", lines))
        if not {"tokenizer", "init_from", "teacher"} & set(self._given):
            name = self._given.get("model", "modernbert-tiny")
            family = self._family(name, objectives=True)
            asked = self._given.get("vocab_size")
            preset: Any = family.config.preset(name)
            size = int(asked) if asked else preset.vocab_size
            if family.tokenizers[0] == "word-bpe":
                raise RunError(f"--model {name}: its kind of tokenizer is not trained here; give --tokenizer.")
            self._add("tokenizer", self._tokenizer(family.tokenizers[0], family.tokenizer_like, size))
            if not asked:
                self.remarks.append(f"the released vocabulary of {size:,}; or give --tokenizer or --vocab-size")

    def _finetune(self) -> None:
        task = self._words[1] if len(self._words) > 1 else next((a for a in self._after if not a.startswith("-")), "")
        self._checkpoint("model")
        if "teacher" in self._given:
            self._checkpoint("teacher")
        if {"data", "train"} & set(self._given):
            return
        length = int(self._given.get("max_length", 384 if task == "squad" else 128))
        count = max(64, 2 * int(self._given.get("batch_size", 32)))
        texts = [self._text(length) for _ in range(count)]  # cut to the maximum length
        self.remarks.append(f"every example has {length} tokens; of shorter ones, several share a row")
        if task == "squad":
            answers = [[{"text": text.split()[0], "answer_start": 0}] for text in texts]
            questions = [{"id": str(n), "question": self._text(9), "answers": a} for n, a in enumerate(answers)]
            paragraphs = [{"context": t, "qas": [q]} for t, q in zip(texts, questions, strict=True)]
            data = {"version": "1.1", "data": [{"title": "", "paragraphs": paragraphs}]}
            path = self._folder / "squad.json"
            write_json(path, data)
            self._add("data", path)
            self._add("eval-data", path)
        elif task == "swag":
            head = ["", "sent1", "sent2", "ending0", "ending1", "ending2", "ending3", "label"]
            rows = [[str(n), t, "a", "b", "c", "d", "e", "0"] for n, t in enumerate(texts)]
            text = "\n".join(",".join(row) for row in (head, *rows)) + "\n"
            self._add("data", self._write("swag.csv", text))
            self._add("eval-data", self._write("swag-dev.csv", text))
        elif task == "codah":
            rows = "".join(f"o\t{t}\tb\tc\td\te\t0\n" for t in texts)
            for split in ("train", "dev", "test"):
                self._add("data", self._write(f"codah/{split}.tsv", rows).parent)
        elif task in ("ner", "pos"):
            tags = ("O", "B-X") if task == "ner" else ("NOUN", "VERB")
            sentences = [[(w, tags[n % 2]) for n, w in enumerate(t.split())] for t in texts]
            if task == "ner":
                lines = ([f"{w} {tag}\n" for w, tag in sentence] for sentence in sentences)
            else:
                after = "_\t_\t0\t_\t_\t_"
                lines = (
                    [f"{n}\t{w}\t_\t{tag}\t{after}\n" for n, (w, tag) in enumerate(sentence, 1)]
                    for sentence in sentences
                )
            text = "\n".join("".join(sentence) for sentence in lines) + "\n"
            suffix = "txt" if task == "ner" else "conllu"
            self._add("data", self._write(f"train.{suffix}", text))
            self._add("eval-data", self._write(f"dev.{suffix}", text))
        elif task == "classification":
            rows = "".join(f"{t}\t{n % 2}\n" for n, t in enumerate(texts))
            self._add("train", self._write("train.tsv", f"sentence\tlabel\n{rows}"))
        elif task in FINETUNED:
            self._add("data", self._glue(task, texts))
            if not {"no_test", "no-test"} & set(self._given):
                self._before.append("--no-test")

    def _glue(self, name: str, texts: list[str]) -> Path:
        of = GLUE[name]
        labels = of.labels or ("1.0", "2.0")
        columns = [of.first, *([of.second] if of.second else []), of.label]
        names = of.header or ("index", *columns)
        rows = []
        for number, text in enumerate(texts):
            first = [text, "a"] if of.second else [text]
            values = dict(zip(columns, [*first, labels[number % len(labels)]], strict=True))
            rows.append("\t".join(values.get(column, str(number)) for column in names))
        table = "\n".join(([] if of.header else ["\t".join(names)]) + rows) + "\n"
        for split in ("train", *of.evaluation):
            self._write(f"glue/{of.folder}/{split}.tsv", table)
        return self._folder / "glue" / of.folder

    def _translate(self) -> None:
        self._add("cache", self._folder / "cache")
        if "init_from" in self._given:
            self._checkpoint("init_from")
        if not {"source", "pairs"} & set(self._given):
            lines = "\n".join(self._text(24) for _ in range(512)) + "\n"
            self._add("source", self._write("source.txt", lines))
            self._add("target", self._write("target.txt", lines))
            self._add("dev-pairs", "32")
        if not {"tokenizer", "init_from"} & set(self._given):
            size = self._given.get("vocab_size") or self._options.defaults([*self._after, *self._before]).vocab_size
            self._add("tokenizer", self._tokenizer("unigram", "t5", int(size)) / "spiece.model")

    def _text2text(self) -> None:
        self._add("cache", self._folder / "cache")
        self._checkpoint("model")
        if not {"train", "glue"} & set(self._given):
            lengths = int(self._given.get("source_tokens", 512)), int(self._given.get("target_tokens", 128))
            rows = "".join(f"{self._text(lengths[0] // 8)}\t{self._text(lengths[1] // 8)}\n" for _ in range(256))
            self._add("train", self._write("pairs.tsv", rows))
            self._add("dev-pairs", "32")

    def _images(self) -> None:
        if self._words[1] == "finetune":
            self._checkpoint("model")
        if "data" not in self._given:
            from PIL import Image

            for number in range(4 * CLASSES):
                path = self._folder / "images" / f"class{number % CLASSES}" / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (300 + number, 300)).save(path)
            self._add("data", self._folder / "images")
            self.remarks.append(f"{CLASSES} classes, in images of the model's size")

    def _multitask(self) -> None:
        self.remarks.append("the data and checkpoints that the task file names: it is planned with them")

    # --- parts ---

    def _add(self, flag: str, value: Any) -> None:
        if flag.replace("-", "_") not in self._given:
            self._before += [f"--{flag}", str(value)]
            self._given[flag.replace("-", "_")] = str(value)

    def _write(self, name: str, text: str) -> Path:
        path = self._folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def _text(self, words: int) -> str:
        return " ".join(self._draw.choices(self._vocabulary, k=words))

    def _family(self, name: str, *, objectives: bool = False) -> Any:
        known = presets()
        if name not in known:
            sizes = [size for size, family in known.items() if family.objectives or not objectives]
            meant = did_you_mean(name, sizes) or f" Expected one of {', '.join(sizes)}."
            raise RunError(f"--model {name}: no folder, and no such size.{meant}")
        return known[name]

    def _checkpoint(self, flag: str) -> None:
        """Replace a flag's value by a folder, if it is the name of a size."""
        name = self._given.get(flag)
        if name is None:
            raise RunError(f"--{flag} is missing: a checkpoint folder, or a size of `bestiary models`.")
        if (Path(name) / "config.json").is_file() or len(Path(name).parts) > 1:
            return
        family = self._family(name)
        config = family.config.preset(name)
        folder = self._folder / "models" / name
        self._weights(folder, family, config)
        if family.reads == "images":
            from ...data.images.processor import Processor

            size: Any = config
            half = (0.5,) * size.channels
            Processor((size.image_size,) * 2, mean=half, std=half, channels=size.channels).save(folder)
        else:
            found = self._tokenizer(family.tokenizers[0], family.tokenizer_like, None)
            for path in found.iterdir():
                shutil.copy2(path, folder)
        dashed = f"--{flag.replace('_', '-')}"
        self._after = list(_replaced(self._after, dashed, str(folder)))
        self._given[flag] = str(folder)

    def _weights(self, folder: Path, family: Any, config: Any) -> None:
        """Write config.json and a sparse model.safetensors of a new model."""
        architecture = family.architectures[0]
        table = architecture.table(config)
        header: dict[str, Any] = {}
        end = 0
        for name in (name for entry in table.entries for name in entry.names):
            shape = table.stored_shape(name)
            size = 4
            for side in shape:
                size *= side
            header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [end, end + size]}
            end += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        folder.mkdir(parents=True)
        write_json(folder / "config.json", config.to_json() | {"architectures": [architecture.name]})
        with (folder / "model.safetensors").open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + end)

    def _tokenizer(self, kind: Any, like: str | None, size: int | None) -> Path:
        """Return the folder of a tokenizer with `size` tokens; None for a few."""
        folder = self._folder / f"tokenizer-{kind}-{size}"
        if not folder.exists():
            text = "\n\n".join("\n".join(self._text(24) for _ in range(8)) for _ in range(64))
            corpus = Corpus((str(self._write("words.txt", text)),))
            train_tokenizer(kind, corpus, vocab_size=SMALL, family=like).save(folder)
            if size is not None:
                _fill_up(folder, kind, size)
        return folder


def _replaced(arguments: Sequence[str], flag: str, value: str) -> Iterator[str]:
    following = False
    for argument in arguments:
        if following:
            yield value
            following = False
        elif argument.startswith(f"{flag}="):
            yield f"{flag}={value}"
        else:
            yield argument
            following = argument == flag


def _fill_up(folder: Path, kind: str, size: int) -> None:
    """Add tokens that no text has to a tokenizer, up to `size`."""
    if kind == "wordpiece":
        tokens = (folder / "vocab.txt").read_text().splitlines()
        (folder / "vocab.txt").write_text("\n".join([*tokens, *(f"[{n}]" for n in range(len(tokens), size))]) + "\n")
    elif kind == "unigram":
        from sentencepiece import sentencepiece_model_pb2

        proto = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
        proto.ParseFromString((folder / "spiece.model").read_bytes())
        for number in range(len(proto.pieces), size):
            proto.pieces.add(piece=f"⁂{number}", score=-100.0)
        proto.trainer_spec.vocab_size = len(proto.pieces)
        (folder / "spiece.model").write_bytes(proto.SerializeToString())
    else:
        vocabulary = json.loads((folder / "vocab.json").read_text())
        vocabulary |= {f"⁂{number}": number for number in range(len(vocabulary), size)}
        (folder / "vocab.json").write_text(json.dumps(vocabulary))
        if kind in ("words", "characters"):  # which are read from the whole tokenizer alone
            whole = json.loads((folder / "tokenizer.json").read_text())
            whole["model"]["vocab"] = vocabulary
            (folder / "tokenizer.json").write_text(json.dumps(whole))
            return
    (folder / "tokenizer.json").unlink()
