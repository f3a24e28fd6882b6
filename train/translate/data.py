"""The text of a translator: pairs, their tokenizer, and rows of them."""

import hashlib
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ...data.cloud.caches import build_once
from ...data.corpus.pair_store import PairStore, build_pairs, describe_pairs, outdated_pairs
from ...data.corpus.parallel import Pair, ParallelText
from ...data.files import user_cache_folder
from ...data.progress import counted
from ...data.rows.translation import TranslationRows
from ...data.tokenizers.pairs import PairTokenizer, TextForm, load_subwords
from ...data.tokenizers.pairs_training import train_subwords
from ..errors import RunError
from ..progress import Progress
from ..sharding import first_process_first
from .config import TranslateConfig


class Texts(NamedTuple):
    """Sentence pairs of a run, before tokenisation."""

    train: Callable[[], Iterable[Pair]]  # reads them again at each call
    dev: list[Pair]
    fingerprint: str  # of the training pairs
    described: str
    notes: Callable[[], list[str]]  # remarks on the training text, once it has been read


def read_texts(config: TranslateConfig) -> Texts:
    """Open the training and dev pairs. Only dev pairs in their own files are read at once."""
    options: dict[str, Any] = dict(fields=config.fields, languages=config.field_names, encoding=config.encoding)
    given = (config.source, config.target) if config.source is not None else (config.pairs,)
    if given == (None,):
        from ...data.corpus.phrases import phrase_pairs

        dev = phrase_pairs("held-out", config.languages)[: config.dev_pairs]
        train = phrase_pairs("train", config.languages)
        return Texts(lambda: train, dev, fingerprint(train), "embedded phrases", list)
    options["empty"] = "drop"
    text = ParallelText([str(path) for path in given if path is not None], **options)
    described = str(text)
    if config.dev:
        options |= {"empty": "keep", "split": "validation"}
        dev = list(ParallelText(config.dev, **options))
        return Texts(lambda: text, dev, text.fingerprint, described, lambda: list(text.findings))
    pairs = sum(1 for _ in text)

    def held_out(pair: Pair) -> bool:
        digest = hashlib.blake2b(pair.source.encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") < config.dev_pairs / pairs * 2**64

    dev = [pair for pair in text if held_out(pair)]
    if not 0 < len(dev) < pairs:
        raise RunError(
            f"{text}: {pairs} pairs are too few to hold {config.dev_pairs} out. Give fewer --dev-pairs, or --dev."
        )
    return Texts(
        lambda: (pair for pair in text if not held_out(pair)),
        dev,
        f"{text.fingerprint} without {config.dev_pairs}",
        described,
        lambda: list(text.findings),
    )


def fingerprint(pairs: Iterable[Pair]) -> str:
    """Return a hash of the contents of pairs."""
    return hashlib.sha256(repr([(pair.source, pair.target) for pair in pairs]).encode()).hexdigest()


class Data(NamedTuple):
    """The tokenised text of a run."""

    tokenizer: PairTokenizer
    train: PairStore
    dev: list[Pair]
    dev_store: PairStore


def prepare_data(config: TranslateConfig, progress: Progress, read: Callable[[], Texts] | None = None) -> Data:
    """Return the tokenizer and the tokenised pairs, which are built if they are missing; `read` opens the texts."""
    root = (config.cache or user_cache_folder()) / "translation"

    def show(report: Any) -> None:
        progress.update(str(report))

    with first_process_first("data_prepared"):
        texts = read_texts(config) if read is None else read()
        form = config.form
        if config.tokenizer_folder is not None:
            tokenizer = load_subwords(config.tokenizer_folder, form).with_prefix(form.prefix)
        else:
            tokenizer = trained_tokenizer(config, texts, form, root / "tokenizers", progress)
        store = partial(build_pairs, tokenizer=tokenizer, root=root / "pairs", progress=show)
        outdated = outdated_pairs(root / "pairs")
        if outdated:
            progress.line(
                f"{root / 'pairs'}: {counted(len(outdated), 'cache')} of an earlier version, which are no longer read. "
                f"Delete {', '.join(path.name for path in outdated)}."
            )
        as_text = config.sample_subwords > 0
        train = store(texts.train, fingerprint=texts.fingerprint, as_text=as_text, notes=texts.notes)
        kept = [pair for pair in texts.dev if pair.source and pair.target]
        dev_store = store(lambda: kept, fingerprint=fingerprint(texts.dev))
    for line in (*describe_pairs(train, texts.described), *describe_pairs(dev_store, "dev")):
        progress.line(line)
    return Data(tokenizer, train, texts.dev, dev_store)


def trained_tokenizer(
    config: TranslateConfig, texts: Texts, form: TextForm, root: Path, progress: Progress
) -> PairTokenizer:
    """Return the tokenizer of this text, after training it if it is missing."""
    split_digits = config.subwords != "word-bpe" if config.split_digits is None else config.split_digits
    key = f"{config.subwords} {config.vocab_size} {config.joint} {split_digits} {form} {texts.fingerprint}"
    folder = root / hashlib.sha256(key.encode()).hexdigest()[:16]

    def build(unfinished: Path) -> None:
        progress.line(f"training a tokenizer with at most {config.vocab_size:,} subwords ({config.subwords})")
        trained = train_subwords(
            config.subwords,
            lambda: (form.prepare(pair.source, target=False) for pair in texts.train()),
            lambda: (form.prepare(pair.target, target=True) for pair in texts.train()),
            vocab_size=config.vocab_size,
            joint=config.joint,
            form=form,
            split_digits=split_digits,
        )
        trained.save(unfinished)

    return load_subwords(build_once(folder, build))


def make_rows(
    config: TranslateConfig, data: Data, start_id: int, progress: Progress, *, dev: bool = False
) -> TranslationRows:
    """Return the training rows, or those of the dev set.

    Raises:
        RunError: pairs are longer than a row, and --too-long refuses them.
    """
    rows = TranslationRows(
        data.dev_store if dev else data.train,
        data.tokenizer,
        source_length=config.lengths[0],
        target_length=config.lengths[1],
        start_id=start_id,
        seed=config.seed,
        sampling=0.0 if dev else config.sample_subwords,
        cut=config.too_long == "cut",
    )
    statistics = rows.statistics()
    too_long = statistics.too_long
    if dev and statistics.cut:
        progress.line(f"dev: {counted(statistics.cut, 'pair')} cut to the length of a row")
    if too_long and dev:
        progress.line(
            f"dev: {too_long:,} {'pair is' if too_long == 1 else 'pairs are'} too long for a row: not in the dev loss; "
            f"long sources are {'translated in parts' if config.sources_too_long == 'split' else 'cut'}"
        )
    if too_long and config.too_long == "refuse":
        raise RunError(
            f"{too_long:,} {'dev ' if dev else ''}pairs are longer than rows of {config.lengths[0]} and "
            f"{config.lengths[1]} tokens: raise the lengths, or drop or cut them by --too-long."
        )
    return rows
