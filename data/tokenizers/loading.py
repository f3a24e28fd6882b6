"""Load tokenizers: `load_tokenizer` reads every kind that released checkpoints come with.

The class is determined by, in this order: tokenizer_config.json or config.json, config.json's model_type, and the
available files. As in the reference implementation (transformers 5), a known class takes the vocabulary and the added
tokens from the files, and everything else from its own definition and tokenizer_config.json, even if tokenizer.json
differs. If a folder names no class, its tokenizer.json is used as it is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, models

from ..errors import DataError
from ..json_files import expect, read_object
from .byte_bpe import GPT2_TOKENS, ROBERTA_TOKENS, ByteBpeTokenizer, byte_bpe_backend
from .sentence_piece import (
    ALBERT_TOKENS,
    EXTRA_IDS,
    MODEL_FILES,
    SPACE,
    T5_TOKENS,
    Pieces,
    SentencePieceModel,
    SentencePieceTokenizer,
    albert_backend,
    extra_ids,
    fairseq_pieces,
    parse_model,
    t5_backend,
    t5_template,
    unigram_pieces,
    xlm_roberta_backend,
    xlm_roberta_template,
)
from .template import Template, bert_template, read_template, roberta_template, write_template
from .tokenizer import ROLES, Tokenizer
from .word_bpe import END, GPT_TOKENS, WordBpeTokenizer, word_bpe_backend
from .word_level import CharacterTokenizer, WordTokenizer
from .wordpiece import SPECIAL_TOKENS, WordPieceTokenizer, bert_backend, read_vocabulary

# Names of the reference's classes -> the class here, of which they are aliases in what concerns ids.
BERTS = ("Bert", "DistilBert", "Electra", "MobileBert", "ConvBert", "SqueezeBert", "LayoutLM", "Lxmert")
CLASSES = {
    **dict.fromkeys(BERTS, "bert"),
    **dict.fromkeys(("Roberta", "Bart", "Longformer", "LED"), "roberta"),
    "GPT2": "gpt2",
    "OpenAIGPT": "openai-gpt",
    "Albert": "albert",
    "T5": "t5",
    "XLMRoberta": "xlm-roberta",
}
# `model_type` of config.json -> the class here; None if tokenizer.json says it all.
MODEL_TYPES: dict[str, str | None] = {
    **dict.fromkeys(("bert", "distilbert", "electra", "mobilebert", "convbert", "squeezebert"), "bert"),
    **dict.fromkeys(("roberta", "bart", "longformer", "led"), "roberta"),
    **dict.fromkeys(("gpt2", "gpt3", "gpt_neo", "gptj"), "gpt2"),
    **{name: name for name in ("openai-gpt", "albert", "xlm-roberta")},
    "modernbert": None,
    **dict.fromkeys(("t5", "mt5"), "t5"),
}
AS_IT_IS = ("PreTrainedTokenizer", "TokenizersBackend")
_KEPT = ("model_max_length",)  # settings that do not affect ids, and are written back


@dataclass
class _Folder:
    """A tokenizer's files, as far as they exist."""

    where: Path
    """file of the vocabulary"""
    settings: dict[str, Any] = field(default_factory=dict)
    """tokenizer_config.json"""
    roles: dict[str, Any] = field(default_factory=dict)
    """special_tokens_map.json"""
    added: dict[str, Any] = field(default_factory=dict)
    """added_tokens.json"""
    model: dict[str, Any] = field(default_factory=dict)
    """config.json"""
    whole: dict[str, Any] | None = None
    """tokenizer.json, if the vocabulary is read from it"""

    @property
    def cls(self) -> str | None:
        """Class of this package; None to use tokenizer.json as it is.

        Raises:
            DataError: the class is unknown.
        """
        named = self.settings.get("tokenizer_class") or self.model.get("tokenizer_class")
        model_type = self.model.get("model_type")
        if named is None and model_type is None:
            return None
        if named is None:
            if model_type not in MODEL_TYPES:
                raise DataError(
                    f"{self.where.parent}: the tokenizer of a {model_type!r} model is not implemented. If its "
                    "tokenizer.json is complete, set tokenizer_class to PreTrainedTokenizerFast in "
                    "tokenizer_config.json."
                )
            return MODEL_TYPES[model_type]
        name = str(named).removesuffix("Fast")
        if name in AS_IT_IS:
            return None
        if name.removesuffix("Tokenizer") not in CLASSES:
            known = ", ".join(f"{known}Tokenizer" for known in CLASSES)
            raise DataError(
                f"{self.where.parent}: the tokenizer_class {named!r} is not implemented; expected one of {known}, or "
                "PreTrainedTokenizerFast, which takes everything from tokenizer.json."
            )
        return CLASSES[name.removesuffix("Tokenizer")]

    def setting(self, name: str, default: Any, kind: type | tuple[type, ...]) -> Any:
        """Return an entry of tokenizer_config.json.

        Raises:
            DataError: it has another type.
        """
        value = self.settings.get(name, default)
        if not isinstance(value, kind) and not (value is None and default is None):
            raise DataError(f"{self.where.parent / 'tokenizer_config.json'}: {name} is {value!r}.")
        return value

    @property
    def _sources(self) -> tuple[dict[str, Any], ...]:
        """Sources of special tokens; as in the reference, their map only if the settings do not describe them."""
        return (self.settings,) if "added_tokens_decoder" in self.settings else (self.settings, self.roles)

    def special_tokens(
        self, defaults: Mapping[str, str], needed: tuple[str, ...] = ("unk", "cls", "sep")
    ) -> dict[str, AddedToken]:
        """Return the token of each role, in the reference's order; by default the class's own."""
        found: dict[str, Any] = dict(defaults)
        for source in self._sources:
            found |= {role: source[f"{role}_token"] for role in ROLES if f"{role}_token" in source}
        if self.settings.get("split_special_tokens"):
            raise DataError(f"{self.where.parent}: split_special_tokens is not supported.")
        missing = [role for role in needed if role in defaults and found[role] is None]
        if missing:
            raise DataError(f"{self.where.parent}: the {missing[0]}_token is null; expected a token.")
        return {role: self._token(found[role], role, special=True) for role in ROLES if found.get(role) is not None}

    @property
    def _extra(self) -> list[Any]:
        """What each source says of special tokens without a role."""
        new, old = "extra_special_tokens", "additional_special_tokens"
        found = [source.get(new) or source.get(old, source.get(new)) for source in self._sources]
        if self.where.suffix == ".model" and len(found) > 1:  # the reference does not read the older name there, then
            found[1] = self.roles.get(new)
        return [some for some in found if some is not None]

    @property
    def lists_extra(self) -> bool:
        """Whether a source has a list of special tokens without a role, even an empty one."""
        return any(isinstance(some, list) for some in self._extra)

    def extra_special_tokens(self) -> list[AddedToken]:
        """Special tokens without a role."""
        found: list[Any] = []
        for some in self._extra:
            found += some.values() if isinstance(some, dict) else some if isinstance(some, list) else [some]
        return [self._token(some, "extra special token", special=True) for some in found]

    def _token(self, said: Any, name: Any, *, special: bool = False) -> AddedToken:
        """Return a token that a file names or describes.

        Raises:
            DataError: it does neither.
        """
        entry = said if isinstance(said, dict) else {"content": said}
        known = ("single_word", "lstrip", "rstrip", "normalized", "special")
        options = {key: entry[key] for key in known if key in entry}
        content = entry.get("content")
        if not isinstance(content, str) or not all(isinstance(value, bool) for value in options.values()):
            raise DataError(f"{self.where.parent}: {name}: expected a token, found {said!r}.")
        return AddedToken(content, **{**options, "special": special or options.get("special", False)})

    def added_tokens(self, special: Mapping[str, AddedToken]) -> Iterator[tuple[int, AddedToken]]:
        """Yield (id in the files, token) of the tokens added to the vocabulary, in the order of ids."""
        roles = {token.content for token in special.values()}
        if "added_tokens_decoder" in self.settings:
            entries = expect(self.settings["added_tokens_decoder"], dict, f"{self.where.parent}: added_tokens_decoder")
            described = {number: expect(entry, dict, f"added token {number}") for number, entry in entries.items()}
        else:
            described = {
                number: {"content": token, "normalized": token not in roles} for token, number in self.added.items()
            }
            described |= {entry.get("id"): entry for entry in (self.whole or {}).get("added_tokens", ())}
        for number, entry in sorted(
            ((_number(n, self.where), entry) for n, entry in described.items()), key=lambda pair: pair[0]
        ):
            yield number, self._token(entry, f"added token {number}", special=entry.get("content") in roles)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load the tokenizer of a folder or file in a released format.

    A vocab.txt without `do_lower_case` in tokenizer_config.json counts as cased if a token has an upper-case letter.

    Args:
        path: a folder with tokenizer.json, vocab.txt, vocab.json and merges.txt, or spiece.model (tokenizer.model,
            sentencepiece.bpe.model), of which the first that exists is used; or one of these files.

    Raises:
        DataError: there is no tokenizer, its class or kind is unknown, files contradict each other, or the vocabulary
            lacks special tokens that the class needs.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        names = ("tokenizer.json", "vocab.txt", "vocab.json", *MODEL_FILES)
        file = next((path / name for name in names if (path / name).is_file()), None)
        if file is None:
            raise DataError(
                f"{path}: no tokenizer in this folder. Expected tokenizer.json, vocab.txt, vocab.json and merges.txt, "
                "or spiece.model."
            )
        path = file
    if not path.is_file():
        raise DataError(f"{path}: there is no such file or folder. Expected a tokenizer's folder or its vocab.txt.")
    folder = _read_folder(path)
    if folder.whole is not None:
        model = folder.whole.get("model")
        kind = model.get("type") if isinstance(model, dict) else None
        build = _BUILD[folder.cls] if folder.cls else _as_it_is
        expected = _MODEL.get(folder.cls or "", kind)
        if kind not in (expected, None):
            raise DataError(f"{path}: a {kind} tokenizer; its class {folder.cls} expects {expected}.")
        return _guarded(lambda: build(folder), path)
    if path.suffix == ".json":
        found = ("roberta", "gpt2", "openai-gpt")
    else:
        found = ("albert", "t5", "xlm-roberta") if path.suffix == ".model" else ("bert",)
    cls = folder.cls or _class_of_vocabulary(folder, found)
    if cls not in found:
        raise DataError(f"{path}: not a file of its tokenizer class, {cls}.")
    return _guarded(lambda: _BUILD[cls](folder), path)


def _read_folder(path: Path) -> _Folder:
    def read(name: str) -> dict[str, Any]:
        file = path.parent / name
        return read_object(file) if file.is_file() else {}

    return _Folder(
        path,
        read("tokenizer_config.json"),
        read("special_tokens_map.json"),
        read("added_tokens.json"),
        read("config.json"),
        read_object(path) if path.suffix == ".json" and path.name != "vocab.json" else None,
    )


# One function per class: vocabulary, added tokens, template


def _bert(folder: _Folder) -> Tokenizer:
    special = folder.special_tokens(SPECIAL_TOKENS)
    said: dict[str, Any] = {}
    if folder.whole is None:
        vocabulary = read_vocabulary(folder.where)
        cased = any(piece != piece.lower() and piece not in SPECIAL_TOKENS.values() for piece in vocabulary)
        said = {"lowercase": not cased}
    else:
        vocabulary = _vocabulary(folder)
        normalizer = folder.whole.get("normalizer") or {}
        if normalizer.get("type") == "BertNormalizer":
            said = normalizer
    unk = special["unk"].content
    if unk not in vocabulary and unk != SPECIAL_TOKENS["unk"]:  # whose absence is told with that of the others
        raise DataError(f"{folder.where}: the vocabulary has no {unk}, its unk_token.")
    backend = bert_backend(
        vocabulary,
        lowercase=bool(folder.setting("do_lower_case", said.get("lowercase", True), bool)),
        strip_accents=folder.setting("strip_accents", said.get("strip_accents"), bool),
        chinese=bool(folder.setting("tokenize_chinese_chars", said.get("handle_chinese_chars", True), bool)),
        unk=unk,
    )
    special = _wordpiece_tokens(special, vocabulary)
    _add_tokens(backend, folder, special)
    return WordPieceTokenizer(backend, _contents(special), settings=_kept(folder), where=str(folder.where))


def _wordpiece_tokens(special: dict[str, AddedToken], vocabulary: Mapping[str, int]) -> dict[str, AddedToken]:
    """Without those of BERT's own that the vocabulary lacks: they are not added, for no model knows their ids."""
    own = SPECIAL_TOKENS.items()
    return {role: t for role, t in special.items() if t.content in vocabulary or (role, t.content) not in own}


def _roberta(folder: _Folder) -> Tokenizer:
    special = folder.special_tokens(ROBERTA_TOKENS)
    backend, spaced = _bytes(folder)
    _add_tokens(backend, folder, special)
    template = roberta_template(backend, _contents(special), str(folder.where), add_prefix_space=spaced)
    return _byte_bpe(folder, backend, template, special, "RobertaTokenizer", spaced)


def _gpt2(folder: _Folder) -> Tokenizer:
    special = folder.special_tokens(GPT2_TOKENS)
    backend, spaced = _bytes(folder)
    _add_tokens(backend, folder, special)
    if folder.whole is None and any(folder.settings.get(name) for name in ("add_bos_token", "add_eos_token")):
        raise DataError(
            f"{folder.where.parent}: add_bos_token and add_eos_token need a tokenizer.json with a post_processor."
        )
    template = Template() if folder.whole is None else _stated(folder, backend)
    backend.post_processor = write_template(template, backend)
    return _byte_bpe(folder, backend, template, special, "GPT2Tokenizer", spaced)


def _gpt(folder: _Folder) -> Tokenizer:
    special = folder.special_tokens(GPT_TOKENS)
    vocabulary, merges = _bpe(folder)
    try:
        backend = word_bpe_backend(vocabulary, merges, special["unk"].content)
    except DataError as error:
        raise DataError(f"{folder.where}: {error}") from None
    _add_tokens(backend, folder, special)
    template = Template() if folder.whole is None else _stated(folder, backend)
    if template != Template():
        backend.post_processor = write_template(template, backend)
    settings = {"tokenizer_class": "OpenAIGPTTokenizer", **_kept(folder)}
    return WordBpeTokenizer(backend, template, _contents(special), settings=settings, where=str(folder.where))


def _bytes(folder: _Folder) -> tuple[tokenizers.Tokenizer, bool]:
    spaced = bool(folder.setting("add_prefix_space", False, bool))
    vocabulary, merges = _bpe(folder)
    try:
        return byte_bpe_backend(vocabulary, merges, add_prefix_space=spaced), spaced
    except DataError as error:
        raise DataError(f"{folder.where}: {error}") from None


def _bpe(folder: _Folder) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return the vocabulary and the merges of a BPE model."""
    if folder.whole is not None:
        pairs = expect(folder.whole["model"], dict, f"{folder.where}: model").get("merges", ())
        merges = [(left, right) for left, right in (p.split(" ") if isinstance(p, str) else p for p in pairs)]
        return _vocabulary(folder), merges
    file = folder.where.with_name("merges.txt")
    if not file.is_file():
        raise DataError(f"{file}: missing. The vocabulary {folder.where} needs its merges.")
    return _guarded(lambda: models.BPE.read_file(str(folder.where), str(file)), file)


def _albert(folder: _Folder) -> Tokenizer:
    special = folder.special_tokens(ALBERT_TOKENS)
    pieces, characters, model = _pieces(folder)
    options: dict[str, Any] = {
        "do_lower_case": bool(folder.setting("do_lower_case", True, bool)),
        "keep_accents": bool(folder.setting("keep_accents", False, bool)),
        "add_prefix_space": bool(folder.setting("add_prefix_space", True, bool)),
    }
    lowercase, keep_accents, spaced = options.values()
    replaced = [name for name in ("add_bos_token", "add_eos_token") if folder.settings.get(name) is not None]
    if replaced and folder.whole is None:  # another template, then
        raise DataError(f"{folder.where.parent / 'tokenizer_config.json'}: {replaced[0]} is not supported for ALBERT.")
    backend = albert_backend(pieces, characters, lowercase=lowercase, keep_accents=keep_accents, spaced=spaced)
    where = str(folder.where)
    stated = folder.whole is not None and folder.whole.get("post_processor") is not None
    if not stated:
        bert_template(backend, _contents(special), where)  # of pieces: added tokens do not stand around texts
    _add_tokens(backend, folder, special, model)
    template = _stated(folder, backend) if stated else bert_template(backend, _contents(special), where)
    if stated:
        backend.post_processor = write_template(template, backend)
    settings = {"tokenizer_class": "AlbertTokenizer", **options, **_kept(folder)}
    return SentencePieceTokenizer(
        backend, template, _contents(special), settings=settings, model=model and model.state, where=where
    )


def _t5(folder: _Folder) -> Tokenizer:
    special = folder.special_tokens(T5_TOKENS)
    pieces, characters, model = _pieces(folder)
    count = folder.setting("extra_ids", EXTRA_IDS, int)
    if not 0 <= count <= 10_000:
        raise DataError(f"{folder.where.parent}: extra_ids is {count}; expected 0 to {10_000}.")
    sentinels = extra_ids(count)
    backend = t5_backend([*pieces, *sentinels] if model else pieces, characters)
    names = [piece for piece, _ in sentinels]
    _add_tokens(backend, folder, special, model)
    if not folder.lists_extra:  # which takes the sentinels' place in the reference
        backend.add_special_tokens(names[::-1])
    template = t5_template(backend, str(folder.where), special["eos"].content)
    settings = {"tokenizer_class": "T5Tokenizer", "extra_ids": len(sentinels), **_kept(folder)}
    if folder.lists_extra:
        settings["extra_special_tokens"] = [token.content for token in folder.extra_special_tokens()]
    return SentencePieceTokenizer(
        backend, template, _contents(special), settings=settings, model=model and model.state, where=str(folder.where)
    )


def _xlm_roberta(folder: _Folder) -> Tokenizer:
    special = folder.special_tokens(ROBERTA_TOKENS, ("unk", "bos", "eos", "pad", "mask"))
    pieces, characters, model = _pieces(folder)
    if model is not None:
        pieces = fairseq_pieces(pieces, _contents(special))
    spaced = bool(folder.setting("add_prefix_space", True, bool))
    backend = xlm_roberta_backend(pieces, characters, spaced=spaced)
    _add_tokens(backend, folder, special, model)
    template = xlm_roberta_template(backend, _contents(special), str(folder.where))
    settings = {"tokenizer_class": "XLMRobertaTokenizer", "add_prefix_space": spaced, **_kept(folder)}
    return SentencePieceTokenizer(
        backend,
        template,
        _contents(special),
        settings=settings,
        model=model and model.state,
        model_file="sentencepiece.bpe.model",
        where=str(folder.where),
    )


def _pieces(folder: _Folder) -> tuple[Pieces, bytes, SentencePieceModel | None]:
    """Return (pieces and scores, the compiled character table, the SentencePiece model if they are from one)."""
    if folder.whole is None:
        model = parse_model(folder.where.read_bytes(), str(folder.where))
        if not model.unigram:
            raise DataError(f"{folder.where}: a BPE model; its class, {folder.cls}, expects a unigram model.")
        return model.pieces, model.characters, model
    return (*unigram_pieces(folder.whole, str(folder.where)), None)


_BUILD = {
    "bert": _bert,
    "roberta": _roberta,
    "gpt2": _gpt2,
    "openai-gpt": _gpt,
    "albert": _albert,
    "t5": _t5,
    "xlm-roberta": _xlm_roberta,
}
_MODEL = {
    "bert": "WordPiece",
    **dict.fromkeys(("roberta", "gpt2", "openai-gpt"), "BPE"),
    **dict.fromkeys(("albert", "t5", "xlm-roberta"), "Unigram"),
}


def _class_of_vocabulary(folder: _Folder, classes: tuple[str, ...]) -> str:
    """Determine the class by the special tokens in the vocabulary, if no file names one.

    Raises:
        DataError: the SentencePiece model is neither ALBERT's nor T5's.
    """
    if "gpt2" in classes:
        vocabulary = set(read_object(folder.where))
        roberta = {"<s>", "</s>", "<mask>"} <= vocabulary
        return "roberta" if roberta else "openai-gpt" if any(piece.endswith(END) for piece in vocabulary) else "gpt2"
    if "albert" in classes:
        first = [piece for piece, _ in _pieces(folder)[0][:5]]
        if first == ["<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"]:
            return "albert"
        if first[:3] == ["<pad>", "</s>", "<unk>"]:
            return "t5"
        raise DataError(
            f"{folder.where}: pieces that begin {', '.join(first)} are neither ALBERT's nor T5's. Name the "
            "tokenizer_class in the folder's tokenizer_config.json."
        )
    return classes[0]


def _byte_bpe(
    folder: _Folder,
    backend: tokenizers.Tokenizer,
    template: Template,
    special: Mapping[str, AddedToken],
    cls: str,
    spaced: bool,
) -> ByteBpeTokenizer:
    settings = {"tokenizer_class": cls, "add_prefix_space": spaced, **_kept(folder)}
    return ByteBpeTokenizer(backend, template, _contents(special), settings=settings, where=str(folder.where))


def _as_it_is(folder: _Folder) -> Tokenizer:
    """Load tokenizer.json as it is."""
    assert folder.whole is not None
    backend = tokenizers.Tokenizer.from_file(str(folder.where))
    backend.no_padding()
    backend.no_truncation()
    kind = folder.whole["model"].get("type") or json.loads(backend.to_str())["model"]["type"]
    pre_tokenizer = folder.whole.get("pre_tokenizer")
    where, settings = str(folder.where), {"tokenizer_class": "PreTrainedTokenizerFast", **_kept(folder)}
    unknown = folder.whole["model"].get("unk_token")
    if unknown is not None and unknown not in backend.get_vocab(with_added_tokens=False):
        raise DataError(f"{where}: the vocabulary has no {unknown}, its unk_token.")
    if folder.whole["model"].get("dropout"):
        raise DataError(f"{where}: dropout is {folder.whole['model']['dropout']}; ids would be random.")
    if kind == "WordPiece":
        if folder.whole.get("post_processor") is None:
            raise DataError(
                f"{where}: no post_processor, so that texts would have no special tokens around them. If it is BERT's, "
                "set tokenizer_class to BertTokenizer in tokenizer_config.json."
            )
        special = _wordpiece_tokens(folder.special_tokens(SPECIAL_TOKENS), backend.get_vocab())
        _add_tokens(backend, folder, special)
        template = _stated(folder, backend)
        return WordPieceTokenizer(backend, _contents(special), settings=settings, template=template, where=where)
    special = folder.special_tokens({})
    merged = bool(folder.whole["model"].get("merges") or pre_tokenizer)
    if kind == "Unigram" and folder.whole["model"].get("unk_id") is None:
        raise DataError(f"{where}: a Unigram tokenizer without unk_id, the id of the unknown token.")
    cls: type[Tokenizer]
    if kind == "WordLevel":
        cls = WordTokenizer
    elif kind == "BPE" and unknown is not None and not merged:
        cls = CharacterTokenizer
    elif kind == "BPE" and '"ByteLevel"' in json.dumps(pre_tokenizer):
        cls = ByteBpeTokenizer
    elif kind == "Unigram" or (kind == "BPE" and SPACE in json.dumps(folder.whole["decoder"], ensure_ascii=False)):
        cls = SentencePieceTokenizer
    else:
        expected = "WordPiece, byte-level BPE, SentencePiece's pieces, words or characters"
        raise DataError(f"{where}: a {kind} tokenizer; expected {expected}.")
    if cls is not WordTokenizer:  # whose special tokens are words
        _add_tokens(backend, folder, special)
    template = _stated(folder, backend)
    if cls is ByteBpeTokenizer:
        backend.post_processor = write_template(template, backend)
    return cls(backend, template, _contents(special), settings=settings, where=where)


# Parts


def _vocabulary(folder: _Folder) -> dict[str, int]:
    assert folder.whole is not None
    model = expect(folder.whole.get("model"), dict, f"{folder.where}: model")
    return expect(model.get("vocab"), dict, f"{folder.where}: vocab")


def _add_tokens(
    backend: tokenizers.Tokenizer,
    folder: _Folder,
    special: Mapping[str, AddedToken],
    model: SentencePieceModel | None = None,
) -> None:
    """Add the added tokens in the files to the backend, then the special ones; new tokens get the next ids.

    Raises:
        DataError: a token gets another id than in the files.
    """
    for number, token in folder.added_tokens(special):
        found = backend.token_to_id(token.content)
        gets = backend.get_vocab_size() if found is None else found
        if gets != number:
            raise DataError(
                f"{folder.where.parent}: the added token {token.content!r} has the id {number}, but the "
                f"vocabulary would give it {gets}."
            )
        backend.add_tokens([token])
    if model is not None:
        backend.add_tokens(model.added)
    # Adding a token again would reset its options, such as that the mask includes the space before it.
    there = {token.content for token in backend.get_added_tokens_decoder().values()}
    for token in (*special.values(), *folder.extra_special_tokens()):
        if token.content not in there:
            backend.add_special_tokens([token])
            there.add(token.content)


def _contents(special: Mapping[str, AddedToken]) -> dict[str, str]:
    return {role: token.content for role, token in special.items()}


def _stated(folder: _Folder, backend: tokenizers.Tokenizer) -> Template:
    """Return the template in tokenizer.json."""
    assert folder.whole is not None
    return read_template(folder.whole.get("post_processor"), backend, f"{folder.where}: post_processor")


def _kept(folder: _Folder) -> dict[str, Any]:
    return {name: folder.settings[name] for name in _KEPT if name in folder.settings}


def _number(value: Any, where: Path) -> int:
    try:
        return int(value)
    except (TypeError, ValueError):
        raise DataError(f"{where.parent}: an added token has the id {value!r}; expected a number.") from None


def _guarded[Made](make: Callable[[], Made], path: Path) -> Made:
    """Call `make`; turn any error of a damaged file, including a panic of the Rust library, into a DataError."""
    try:
        return make()
    except (DataError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise DataError(
            f"{path}: not a {path.name} that `tokenizers` {tokenizers.__version__} reads ({error})."
        ) from None
