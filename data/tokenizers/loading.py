"""Which tokenizer a folder holds: `load_tokenizer` reads every kind that the released checkpoints come with.

What decides, in this order: the class that tokenizer_config.json or config.json names, the class of config.json's
model_type, and the files that are there. As in the reference implementation (transformers 5), a class of its list
takes the vocabulary and the added tokens from the files, and everything else from its own definition and from
tokenizer_config.json: a tokenizer.json that says otherwise is not asked. A folder that names no class has its
tokenizer.json taken as it is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, models, processors

from ..errors import DataError
from .byte_bpe import GPT2_TOKENS, ROBERTA_TOKENS, ByteBpeTokenizer, byte_bpe_backend, roberta_template
from .tokenizer import ROLES, Template, Tokenizer
from .wordpiece import SPECIAL_TOKENS, WordPieceTokenizer, bert_backend, read_vocabulary

# Names of the reference's classes -> the class here, of which they are aliases in what concerns ids.
CLASSES = {
    **dict.fromkeys(
        ("Bert", "DistilBert", "Electra", "MobileBert", "ConvBert", "SqueezeBert", "LayoutLM", "Lxmert"), "bert"
    ),
    **dict.fromkeys(("Roberta", "Bart", "Longformer", "LED"), "roberta"),
    "GPT2": "gpt2",
}
MODEL_TYPES = {
    **dict.fromkeys(("bert", "distilbert", "electra", "mobilebert", "convbert", "squeezebert"), "bert"),
    **dict.fromkeys(("roberta", "bart", "longformer", "led"), "roberta"),
    **dict.fromkeys(("gpt2", "gpt_neo", "gptj"), "gpt2"),
}
AS_IT_IS = ("PreTrainedTokenizer", "TokenizersBackend")
_KEPT = ("model_max_length",)  # settings that are not about ids, and are written again


@dataclass
class _Folder:
    """A tokenizer's files, as far as they are there."""

    where: Path
    """the file that the vocabulary is read from"""
    settings: dict[str, Any] = field(default_factory=dict)
    """tokenizer_config.json"""
    roles: dict[str, Any] = field(default_factory=dict)
    """special_tokens_map.json"""
    added: dict[str, Any] = field(default_factory=dict)
    """added_tokens.json"""
    model: dict[str, Any] = field(default_factory=dict)
    """config.json"""
    whole: dict[str, Any] | None = None
    """tokenizer.json, where the vocabulary is read from it"""

    @property
    def cls(self) -> str | None:
        """The class here; None to take tokenizer.json as it is.

        Raises:
            DataError: another class is named.
        """
        named = self.settings.get("tokenizer_class") or self.model.get("tokenizer_class")
        if named is None:
            return MODEL_TYPES.get(str(self.model.get("model_type")))
        name = str(named).removesuffix("Fast")
        if name in AS_IT_IS:
            return None
        if name.removesuffix("Tokenizer") not in CLASSES:
            known = ", ".join(f"{known}Tokenizer" for known in CLASSES)
            raise DataError(
                f"{self.where.parent}: the tokenizer_class {named!r} is none that is known here: {known}, and "
                "PreTrainedTokenizerFast, whose tokenizer.json says it all."
            )
        return CLASSES[name.removesuffix("Tokenizer")]

    def setting(self, name: str, default: Any, kind: type | tuple[type, ...]) -> Any:
        """An entry of tokenizer_config.json.

        Raises:
            DataError: it is of another kind.
        """
        value = self.settings.get(name, default)
        if value is not None and not isinstance(value, kind):
            raise DataError(f"{self.where.parent / 'tokenizer_config.json'}: {name} is {value!r}.")
        return value

    def special_tokens(self, defaults: Mapping[str, str]) -> dict[str, str]:
        """The token of each role; what the files do not name is the class's own."""
        found = dict(defaults)
        # As in the reference, the map of special tokens is asked where the settings do not describe the added tokens.
        sources = (self.settings,) if "added_tokens_decoder" in self.settings else (self.settings, self.roles)
        for source in sources:
            for role in ROLES:
                if f"{role}_token" in source:
                    token = source[f"{role}_token"]
                    content = token.get("content") if isinstance(token, dict) else token
                    if content is None:
                        found.pop(role, None)
                    elif isinstance(content, str):
                        found[role] = content
                    else:
                        raise DataError(f"{self.where.parent}: the {role}_token is {token!r}; expected text.")
        return found

    def added_tokens(self, special: Mapping[str, str]) -> Iterator[tuple[int | None, AddedToken]]:
        """(the id that the files tell, the token) of what stands beside the vocabulary, in the order of ids."""
        if "added_tokens_decoder" in self.settings:
            entries = _object(self.settings["added_tokens_decoder"], f"{self.where.parent}: added_tokens_decoder")
            described = {number: _object(entry, f"added token {number}") for number, entry in entries.items()}
        else:
            described = {
                number: {"content": token, "normalized": token not in special.values()}
                | ({"special": True} if token in special.values() else {})
                for token, number in self.added.items()
            }
            described |= {entry.get("id"): entry for entry in (self.whole or {}).get("added_tokens", ())}
        for number, entry in sorted(((_number(n, self.where), entry) for n, entry in described.items()), key=_first):
            known = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
            options = {name: value for name, value in entry.items() if name in known}
            content = options.pop("content", None)
            if not isinstance(content, str) or not all(isinstance(value, bool) for value in options.values()):
                raise DataError(f"{self.where.parent}: the added token {number} is {entry!r}.")
            options["special"] = options.get("special", False) or content in special.values()
            yield number, AddedToken(content, **options)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a folder or file in a released format.

    Args:
        path: a folder with tokenizer.json, vocab.txt, or vocab.json and merges.txt, the first of them that is there;
            or one of these files.

    A vocab.txt without a word on lower-casing (`do_lower_case` of tokenizer_config.json) is taken for a cased one where
    a piece has an upper-case letter.

    Raises:
        DataError: nothing of the kind there, a class or a kind that is not known, files that contradict each other, or
            a vocabulary without the special tokens that its class needs.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        names = ("tokenizer.json", "vocab.txt", "vocab.json")
        file = next((path / name for name in names if (path / name).is_file()), None)
        if file is None:
            raise DataError(
                f"{path}: no tokenizer in this folder. Expected tokenizer.json, vocab.txt, or vocab.json and "
                "merges.txt."
            )
        path = file
    if not path.is_file():
        raise DataError(f"{path}: there is no such file or folder. Expected a tokenizer's folder or its vocab.txt.")
    folder = _read_folder(path)
    if folder.whole is not None:
        model = folder.whole.get("model")
        kind = model.get("type") if isinstance(model, dict) else None
        build = {"bert": _bert, "roberta": _roberta, "gpt2": _gpt2}.get(folder.cls or "", _as_it_is)
        expected = {_bert: "WordPiece", _roberta: "BPE", _gpt2: "BPE"}.get(build, kind)
        if kind not in (expected, None):
            raise DataError(f"{path}: a {kind} tokenizer; its class {folder.cls} expects {expected}.")
    elif path.name == "vocab.json" or path.suffix == ".json":
        build = {"roberta": _roberta, "gpt2": _gpt2, None: _bytes_of_some_class}.get(folder.cls)
    else:
        build = {"bert": _bert, None: _bert}.get(folder.cls)
    if build is None:
        raise DataError(f"{path}: the files of another tokenizer than its class, {folder.cls}.")
    return build(folder)


def _read_folder(path: Path) -> _Folder:
    def beside(name: str) -> dict[str, Any]:
        file = path.parent / name
        return _read_object(file) if file.is_file() else {}

    return _Folder(
        path,
        beside("tokenizer_config.json"),
        beside("special_tokens_map.json"),
        beside("added_tokens.json"),
        beside("config.json"),
        _read_object(path) if path.suffix == ".json" and path.name != "vocab.json" else None,
    )


# One function a class: vocabulary, added tokens, template


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
    backend = bert_backend(
        vocabulary,
        lowercase=bool(folder.setting("do_lower_case", said.get("lowercase", True), bool)),
        strip_accents=folder.setting("strip_accents", said.get("strip_accents"), bool),
        chinese=bool(folder.setting("tokenize_chinese_chars", said.get("handle_chinese_chars", True), bool)),
        unk=special.get("unk", SPECIAL_TOKENS["unk"]),
    )
    _add_tokens(backend, folder, {role: special[role] for role in SPECIAL_TOKENS if role in special})
    return WordPieceTokenizer(backend, special, settings=_kept(folder), where=str(folder.where))


def _roberta(folder: _Folder) -> Tokenizer:
    special = folder.special_tokens(ROBERTA_TOKENS)
    backend, spaced = _bytes(folder)
    _add_tokens(backend, folder, special)
    template = roberta_template(backend, special, add_prefix_space=spaced, where=str(folder.where))
    return _byte_bpe(folder, backend, template, special, "RobertaTokenizer", spaced)


def _gpt2(folder: _Folder) -> Tokenizer:
    special = folder.special_tokens(GPT2_TOKENS)
    backend, spaced = _bytes(folder)
    _add_tokens(backend, folder, special)
    template = Template() if folder.whole is None else _template(folder.whole.get("post_processor"), backend, folder)
    backend.post_processor = _trimming(template, backend)
    return _byte_bpe(folder, backend, template, special, "GPT2Tokenizer", spaced)


def _bytes(folder: _Folder) -> tuple[tokenizers.Tokenizer, bool]:
    spaced = bool(folder.setting("add_prefix_space", False, bool))
    if folder.whole is not None:
        pairs = _object(folder.whole["model"], f"{folder.where}: model").get("merges", ())
        merges = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in pairs]
        vocabulary = _vocabulary(folder)
    else:
        file = folder.where.with_name("merges.txt")
        if not file.is_file():
            raise DataError(f"{file}: not there. The vocabulary {folder.where} needs its merges.")
        vocabulary, merges = _guarded(lambda: models.BPE.read_file(str(folder.where), str(file)), file)
    try:
        return byte_bpe_backend(vocabulary, merges, add_prefix_space=spaced), spaced
    except DataError as error:
        raise DataError(f"{folder.where}: {error}") from None


def _bytes_of_some_class(folder: _Folder) -> Tokenizer:
    vocabulary = _read_object(folder.where)
    return (_roberta if {"<s>", "</s>", "<mask>"} <= set(vocabulary) else _gpt2)(folder)


def _byte_bpe(
    folder: _Folder,
    backend: tokenizers.Tokenizer,
    template: Template,
    special: Mapping[str, str],
    cls: str,
    spaced: bool,
) -> ByteBpeTokenizer:
    settings = {"tokenizer_class": cls, "add_prefix_space": spaced, **_kept(folder)}
    return ByteBpeTokenizer(backend, template, special, settings=settings, where=str(folder.where))


def _as_it_is(folder: _Folder) -> Tokenizer:
    """tokenizer.json and what it says."""
    assert folder.whole is not None
    backend = _guarded(lambda: tokenizers.Tokenizer.from_file(str(folder.where)), folder.where)
    backend.no_padding()
    backend.no_truncation()
    kind = folder.whole["model"].get("type") or json.loads(backend.to_str())["model"]["type"]
    where = str(folder.where)
    if kind == "WordPiece":
        special = folder.special_tokens(SPECIAL_TOKENS)
        _add_tokens(backend, folder, {role: special[role] for role in SPECIAL_TOKENS if role in special})
        stated = folder.whole.get("post_processor")
        template = None if stated is None else _template(stated, backend, folder)
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", **_kept(folder)} if template else _kept(folder)
        return WordPieceTokenizer(backend, special, settings=settings, template=template, where=where)
    if kind == "BPE" and '"ByteLevel"' in json.dumps(folder.whole.get("pre_tokenizer")):
        special = folder.special_tokens({})
        _add_tokens(backend, folder, special)
        template = _template(folder.whole.get("post_processor"), backend, folder)
        backend.post_processor = _trimming(template, backend)
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", **_kept(folder)}
        return ByteBpeTokenizer(backend, template, special, settings=settings, where=where)
    raise DataError(f"{where}: a {kind} tokenizer; expected WordPiece or byte-level BPE.")


# Parts


def _vocabulary(folder: _Folder) -> dict[str, int]:
    assert folder.whole is not None
    return _object(_object(folder.whole.get("model"), f"{folder.where}: model").get("vocab"), f"{folder.where}: vocab")


def _add_tokens(backend: tokenizers.Tokenizer, folder: _Folder, special: Mapping[str, str]) -> None:
    """Give the backend the added tokens that the files name, then the special ones of the vocabulary.

    Raises:
        DataError: a token gets another id than the files tell.
    """
    for number, token in folder.added_tokens(special):
        if number is not None:
            found = backend.token_to_id(token.content)
            gets = backend.get_vocab_size() if found is None else found
            if gets != number:
                raise DataError(
                    f"{folder.where.parent}: the added token {token.content!r} is to have the id {number}, but the "
                    f"vocabulary gives it {gets}."
                )
        backend.add_tokens([token])
    known = backend.get_vocab()
    backend.add_special_tokens(list(dict.fromkeys(token for token in special.values() if token in known)))


def _template(stated: Any, backend: tokenizers.Tokenizer, folder: _Folder) -> Template:
    """What a tokenizer.json puts around texts.

    Raises:
        DataError: something that is not of the form `before A after` and `before A between B after`, or has tokens
            that the vocabulary does not know by these ids.
    """
    if stated is None:
        return Template()
    where = f"{folder.where}: post_processor"
    stated = _object(stated, where)
    kind = stated.get("type")
    if kind == "Sequence":
        found = [_template(step, backend, folder) for step in stated.get("processors", ())]
        return next((template for template in found if template != Template()), Template())
    if kind == "ByteLevel":
        return Template()
    try:
        if kind in ("BertProcessing", "RobertaProcessing"):
            (sep_token, sep), (cls_token, cls) = stated["sep"], stated["cls"]
            named = {cls_token: cls, sep_token: sep}
            template = Template((cls,), (sep,) if kind == "BertProcessing" else (sep, sep), (sep,))
            template = Template(*_parts(template), int(kind == "BertProcessing"))
        elif kind == "TemplateProcessing":
            template, named = _stated_template(stated)
        else:
            raise ValueError(f"of type {kind}")
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise DataError(f"{where}: expected special tokens before, between and after texts, found {error}.") from None
    for token, number in named.items():
        if backend.token_to_id(token) != number:
            raise DataError(f"{where}: it gives {token!r} the id {number}; the vocabulary has it at "
                            f"{backend.token_to_id(token)}.")  # fmt: skip
    return template


def _parts(template: Template) -> tuple[tuple[int, ...], ...]:
    return template.before, template.between, template.after


def _stated_template(stated: Mapping[str, Any]) -> tuple[Template, dict[str, int]]:
    """(a TemplateProcessing as a template, the ids of its tokens)."""
    tokens = stated["special_tokens"]
    named: dict[str, int] = {}

    def parts(pieces: list[Any], sequences: int) -> tuple[list[list[int]], list[list[int]]]:
        """(ids, token types) before, between and after the sequences."""
        ids: list[list[int]] = [[]]
        types: list[list[int]] = [[]]
        for piece in pieces:
            if "Sequence" in piece:
                if piece["Sequence"]["id"] != "AB"[len(ids) - 1]:
                    raise ValueError("texts in another order")
                types[-1].append(piece["Sequence"]["type_id"])
                ids.append([])
                types.append([])
            else:
                some = tokens[piece["SpecialToken"]["id"]]
                named.update(zip(some["tokens"], some["ids"], strict=True))
                ids[-1] += some["ids"]
                types[-1] += [piece["SpecialToken"]["type_id"]] * len(some["ids"])
        if len(ids) != sequences + 1:
            raise ValueError(f"{len(ids) - 1} texts for {sequences}")
        return ids, types

    (before, after), single_types = parts(stated["single"], 1)
    (pair_before, between, pair_after), pair_types = parts(stated["pair"], 2)
    if (before, after) != (pair_before, pair_after):
        raise ValueError("other tokens around a pair than around a text")
    second = pair_types[1][-1]  # the second text's own
    kinds = [any(some) for some in single_types], set(pair_types[0] + pair_types[1][:-1]), set(pair_types[2])
    if any(kinds[0]) or kinds[1] - {0} or kinds[2] - {second}:
        raise ValueError("token types that are not 0 up to the second text")
    return Template(tuple(before), tuple(between), tuple(after), second), named


def _trimming(template: Template, backend: tokenizers.Tokenizer) -> Any:
    """A template for tokenizer.json, after a step that takes the spaces before words out of their spans."""
    trim = processors.ByteLevel(trim_offsets=True)
    if template == Template():
        return trim
    tokens = {token: number for token, number in backend.get_vocab().items() if number in sum(_parts(template), ())}
    by_id = {number: token for token, number in tokens.items()}
    before, between, after = ([by_id[number] for number in part] for part in _parts(template))
    kind = template.second_type
    single = [*(f"{token}:0" for token in before), "$A:0", *(f"{token}:0" for token in after)]
    pair = [*(f"{token}:0" for token in before), "$A:0", *(f"{token}:0" for token in between), f"$B:{kind}"]
    pair += [f"{token}:{kind}" for token in after]
    around = processors.TemplateProcessing(single=single, pair=pair, special_tokens=list(tokens.items()))
    return processors.Sequence([trim, around])


def _kept(folder: _Folder) -> dict[str, Any]:
    return {name: folder.settings[name] for name in _KEPT if name in folder.settings}


def _read_object(path: Path) -> dict[str, Any]:
    """A file's JSON object.

    Raises:
        DataError: it holds something else; with the line.
    """
    try:
        value = json.loads(path.read_bytes().decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: not JSON ({error.msg}, column {error.colno}).") from None
    except (UnicodeDecodeError, RecursionError, ValueError) as error:
        raise DataError(f"{path}: not JSON ({error}).") from None
    return _object(value, str(path))


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected an object, found {type(value).__name__}.")
    return value


def _number(value: Any, where: Path) -> int:
    try:
        return int(value)
    except (TypeError, ValueError):
        raise DataError(f"{where.parent}: an added token has the id {value!r}; expected a number.") from None


def _first(pair: tuple[int, Any]) -> int:
    return pair[0]


def _guarded[Made](make: Callable[[], Made], path: Path) -> Made:
    """What `make` gives; whatever the library raises, a panic of its Rust too, becomes a DataError."""
    try:
        return make()
    except BaseException as error:
        if isinstance(error, (KeyboardInterrupt, SystemExit, MemoryError)):
            raise
        raise DataError(
            f"{path}: not a {path.name} that `tokenizers` {tokenizers.__version__} reads ({error})."
        ) from None
