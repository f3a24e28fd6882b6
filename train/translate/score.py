"""Score translations: sacreBLEU's BLEU and chrF with their signatures, and tokenised BLEU under its own name.

    bestiary translate score --model runs/ende --source test.en.gz --reference test.de.gz
    bestiary translate score --hypothesis translation.txt --reference test.de.gz

`bleu` and `chrf` are what to report: sacreBLEU (Post 2018) splits the words itself, by the rules for the target
language, so the figures of different systems can be compared. `tokenised_bleu` is multi-bleu.perl's, over words as the
Moses scripts split them, and `tokenised_bleu_lowercase` the same with -lc. Compare them only with figures for text that
was prepared in the same way, as in the papers that quote them.
"""

import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Protocol

import tyro

from ...data.corpus.parallel import ParallelText
from ...data.progress import counted
from ...data.tokenizers.pairs import TextForm
from ..arguments import flags
from ..errors import RunError
from ..generate.config import DecodeConfig, refuse_decoding_flags
from ..progress import Progress
from .config import DECODE

if TYPE_CHECKING:
    from .translator import Translation

ISO_639_1 = {"zho": "zh", "chi": "zh", "cmn": "zh", "jpn": "ja", "jap": "ja", "kor": "ko"}
"""Longer codes, as in released translators, of the languages that sacreBLEU has a tokenizer for."""


class Scores(NamedTuple):
    """Figures by name, and sacreBLEU's signatures."""

    values: dict[str, float]
    signatures: dict[str, str]
    details: dict[str, str]  # of the tokenised figures, as printed by multi-bleu.perl

    def __str__(self) -> str:
        shown = "  ".join(f"{name} {value:.2f}" for name, value in self.values.items())
        signature = next(iter(self.signatures.values()), None)
        return shown if signature is None else f"{shown}  ({signature})"


class Scoring(Protocol):
    """Figures of a model's outputs for a set of texts."""

    @property
    def deciding(self) -> str:
        """Name of the figure for model selection; the greatest is the best."""
        ...

    def __call__(self, outputs: "Sequence[Translation]", references: Sequence[str]) -> Scores:
        """Compute the figures of outputs, one for each reference."""
        ...


@dataclass(frozen=True)
class Bleu:
    """The figures of translations of this form."""

    form: TextForm

    @property
    def deciding(self) -> str:
        """See `Scoring`."""
        return deciding(self.form)

    def __call__(self, outputs: "Sequence[Translation]", references: Sequence[str]) -> Scores:
        """See `Scoring`."""
        return translation_scores(outputs, references, self.form)


def deciding(form: TextForm) -> str:
    """Return the figure for model selection, which does not penalise a model for writing only lower case."""
    return "bleu_lowercase" if form.lowercase else "bleu"


def bleu_language(language: str) -> str:
    """Return the code by which sacreBLEU chooses its tokenizer, which differs for Chinese, Japanese and Korean.

    Args:
        language: ISO 639 code of the text, optionally followed by a script or a region (zh_TW).

    Raises:
        RunError: the language is Japanese or Korean, and the dictionary for splitting it into words is not installed.
    """
    from sacrebleu.metrics.bleu import BLEU

    code = re.split("[-_]", language.lower())[0]
    code = ISO_639_1.get(code, code)
    try:
        BLEU(trg_lang=code)
    except RuntimeError:
        raise RunError(
            f"BLEU for language {language!r} needs MeCab to split words, which is not installed: "
            f"pip install 'sacrebleu[{code}]'."
        ) from None
    return code


def corpus_scores(
    translations: Sequence[str],
    references: Sequence[str],
    form: TextForm,
    prepared: Sequence[str] | None = None,
) -> Scores:
    """Score translations against one reference each.

    Args:
        translations: detokenised text.
        references: detokenised text, one per translation.
        form: text form; its second language is that of the text. If it lower-cases, the references are lower-cased too
            for the tokenised BLEU.
        prepared: the model's output, already split into words; None: split the translations like the references.

    Raises:
        RunError: the language is Japanese or Korean, and the dictionary for splitting it into words is not installed.
    """
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    language = bleu_language(form.languages[1])
    cased, lower, chrf = BLEU(trg_lang=language), BLEU(lowercase=True, trg_lang=language), CHRF()
    lists = list(translations), [list(references)]
    bleu = cased.corpus_score(*lists)
    in_words = replace(form, moses=True)
    words = (
        [in_words.prepare(text, target=True) for text in translations] if prepared is None else list(prepared),
        [[in_words.prepare(text, target=True) for text in references]],
    )
    tokenised = {
        name: BLEU(tokenize="none", force=True, smooth_method="none", lowercase=lowercase).corpus_score(*words)
        for name, lowercase in (("tokenised_bleu", False), ("tokenised_bleu_lowercase", True))
    }
    values = {
        "bleu": bleu.score,
        "bleu_lowercase": lower.corpus_score(*lists).score,
        "chrf": chrf.corpus_score(*lists).score,
        **{name: found.score for name, found in tokenised.items()},
        "exact_match": 100 * sum(map(str.__eq__, translations, references)) / max(1, len(references)),
    }
    signatures = {"bleu_signature": str(cased.get_signature()), "chrf_signature": str(chrf.get_signature())}
    details = {
        name: f"BLEU = {found.score:.2f}, {'/'.join(f'{precision:.1f}' for precision in found.precisions)} "
        f"(BP={found.bp:.3f}, ratio={found.sys_len / max(1, found.ref_len):.3f}, hyp_len={found.sys_len}, "
        f"ref_len={found.ref_len})"
        for name, found in tokenised.items()
    }
    return Scores(values, signatures, details)


def translation_scores(translations: "Sequence[Translation]", references: Sequence[str], form: TextForm) -> Scores:
    """Score a model's translations. If its text form splits words as Moses does, its words are used as they are."""
    prepared = [found.prepared for found in translations] if form.moses else None
    return corpus_scores([found.text for found in translations], references, form, prepared)


@dataclass(frozen=True)
class ScoreConfig:
    """Translate a test set and score it, or score translations that exist already."""

    reference: Path
    """File of reference translations, one per line (.gz and .zst too)."""
    model: Path | None = None
    """Run folder or checkpoint folder of the model that translates --source."""
    source: Path | None = None
    """File of source sentences, one per line: the sources of --reference."""
    hypothesis: Path | None = None
    """File of translations to score, instead of --model and --source."""
    language: str | None = None
    """With --hypothesis: language of the text (ISO 639-1), whose rules split it into words. None: de. For a model, its
    tokenizer names the language."""
    encoding: str = "utf-8"
    """Character encoding of the files."""
    decode: Annotated[DecodeConfig, tyro.conf.arg(name="")] = DECODE
    batch: int = 64
    """Sentences per batch."""
    longest: int = 0
    """Maximum length of a sentence, in tokens; longer sentences are translated in parts. 0: the length used in
    training."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the computation."""
    generation_config: bool = False
    """Use the decoding settings in the checkpoint's generation_config.json, instead of the decoding flags."""
    translations: Path | None = None
    """With --model: file to write the translations to."""
    out: Path | None = None
    """JSON file to write the figures to; they are also printed."""

    def __post_init__(self) -> None:
        if (self.model is None) != (self.source is None) or (self.model is None) == (self.hypothesis is None):
            raise RunError("Give --model and --source, or --hypothesis alone.")
        if self.generation_config and self.decode != DECODE:
            raise RunError("--generation-config replaces the flags of decoding: leave one out.")
        if self.language is not None:
            if self.hypothesis is None:
                raise RunError("--language is for --hypothesis: the language of --model is in its tokenizer.")
            check_language(self.language)

    @staticmethod
    def check_arguments(arguments: Sequence[str]) -> None:
        """Refuse flags that another flag makes meaningless, whatever their values."""
        given = flags(arguments)
        if "generation_config" in given:
            refuse_decoding_flags(given, "--generation-config replaces the flags of decoding")
        if "hypothesis" in given:
            refuse_decoding_flags(given, "--hypothesis is translated already")
            unused = [
                name for name in ("batch", "longest", "dtype", "generation_config", "translations") if name in given
            ]
            if unused:
                raise RunError(f"--hypothesis is translated already: leave --{unused[0].replace('_', '-')} out.")


def check_language(language: str) -> None:
    """Raise RunError unless this is the code of a language in CLDR, such as `de` or `zh_TW`."""
    from babel import Locale, UnknownLocaleError

    try:
        Locale.parse(language)
    except (UnknownLocaleError, ValueError):
        raise RunError(f"--language {language}: expected an ISO 639-1 code like de, fr or zh.") from None


def main(config: ScoreConfig) -> int:
    """Run `bestiary translate score`; return the exit status."""
    # Imported here, since they import JAX, which would delay --help.
    from ...data.files import check_output, write_text
    from ...data.json_files import json_text, write_json
    from .translator import open_translator

    for path in (config.out, config.translations):
        if path is not None:
            check_output(path)
    progress = Progress()
    result: dict[str, Any] = {"task": "translate score"}
    if config.model is None or config.source is None:
        assert config.hypothesis is not None
        references, translations = read_two(config.reference, config.hypothesis, config.encoding)
        language = config.language or TextForm().languages[1]
        found = corpus_scores(translations, references, TextForm((language, language)))
    else:
        sources, references = read_two(config.source, config.reference, config.encoding)
        translator = open_translator(
            config.model,
            None if config.generation_config else config.decode,
            rows=config.batch,
            longest=config.longest,
            dtype=config.dtype,
        )
        bleu_language(translator.tokenizer.form.languages[1])  # a missing dictionary is reported before the work
        clock = time.perf_counter()
        translated = [answers[0] for answers in translator.translate(sources)]
        seconds = time.perf_counter() - clock
        result["settings"] = {**asdict(translator.decode), "batch": config.batch, "dtype": config.dtype}
        result["seconds_with_compilation"] = seconds
        for note in translator.findings:
            progress.line(note)
        if config.translations is not None:
            write_text(config.translations, "".join(f"{translation.text}\n" for translation in translated))
        found = translation_scores(translated, references, translator.tokenizer.form)
    result |= {"sentences": len(references), **found.values, **found.signatures}
    result["tokenised_bleu_details"] = found.details
    progress.line(counted(len(references), "sentence"))
    for name, line in found.details.items():
        progress.line(f"{name} (multi-bleu style): {line}")
    if config.out is not None:
        write_json(config.out, result)
    print(json_text(result, "the scores", indent=2))
    return 0


def read_two(first: Path, second: Path, encoding: str) -> tuple[list[str], list[str]]:
    """Read the lines of two files of the same length, with control characters as spaces.

    Raises:
        CorpusError: the files have different numbers of lines, or one is not in this encoding.
    """
    pairs = list(ParallelText([first, second], encoding=encoding))
    return [pair.source for pair in pairs], [pair.target for pair in pairs]
