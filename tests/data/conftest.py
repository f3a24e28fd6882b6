"""Small corpora and caches that the tests of `bestiary.data` share."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from bestiary.data import Corpus, DocumentStore, Tokenizer, build_documents, load_tokenizer

WORDS = 3000
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def word(number: int) -> str:
    """A word of letters alone, one for each number: a piece of the vocabulary below, which never ends a sentence."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    return "".join(letters[number // 26**place % 26] for place in range(3)) + "o"


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Knows `WORDS` made-up words and the full stop; 3,006 pieces."""
    path = tmp_path_factory.mktemp("tokenizer") / "vocab.txt"
    path.write_text("\n".join([*SPECIAL, ".", *map(word, range(WORDS))]) + "\n")
    return load_tokenizer(path)


@pytest.fixture(scope="session")
def write_documents() -> Callable[..., list[list[list[str]]]]:
    """Writes text files of random words, one document each; gives their sentences, lists of words and a full stop."""

    def write(
        folder: Path, count: int, seed: int = 0, sentences: tuple[int, ...] = (1, 2, 5, 60, 60), longest: int = 25
    ):
        draw = random.Random(seed)
        folder.mkdir(parents=True, exist_ok=True)
        documents = []
        for number in range(count):
            lengths = [draw.randint(1, longest) for _ in range(draw.choice(sentences))]
            document = [[word(draw.randrange(WORDS)) for _ in range(length)] for length in lengths]
            text = " ".join(" ".join(sentence).capitalize() + "." for sentence in document)
            (folder / f"{number:04d}.txt").write_text(text + "\n")
            documents.append([[*sentence, "."] for sentence in document])
        return documents

    return write


@pytest.fixture(scope="session")
def documents(
    tmp_path_factory: pytest.TempPathFactory, write_documents: Callable[..., list[list[list[str]]]]
) -> tuple[Path, list[list[list[str]]]]:
    """A folder of 60 documents, and what is in them."""
    folder = tmp_path_factory.mktemp("documents")
    return folder, write_documents(folder, 60)


@pytest.fixture(scope="session")
def cache(
    documents: tuple[Path, list[list[list[str]]]], tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> DocumentStore:
    """Those documents, tokenised."""
    return build_documents(Corpus([documents[0]]), tokenizer, tmp_path_factory.mktemp("caches"))


@pytest.fixture
def file(tmp_path: Path) -> Callable[[str, str | bytes], Path]:
    """Writes a file into the test's folder and gives its path."""

    def write(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


@pytest.fixture(scope="session")
def write_tfds() -> Callable[..., Path]:
    """Writes a prepared tensorflow-datasets folder, without TensorFlow."""

    def write(folder: Path, examples: list[str], feature: str = "text") -> Path:
        import tensorflow_datasets as tfds
        from array_record.python.array_record_module import ArrayRecordWriter

        folder.mkdir(parents=True)
        features = tfds.features.FeaturesDict({feature: tfds.features.Text()})
        template = tfds.core.ShardedFileTemplate(
            data_dir=tfds.core.Path(folder), dataset_name="some", split="train", filetype_suffix="array_record"
        )
        writer = ArrayRecordWriter(str(template.sharded_filepath(shard_index=0, num_shards=1)), "group_size:1")
        for text in examples:
            writer.write(features.serialize_example({feature: text}))
        writer.close()
        split = tfds.core.SplitInfo(
            name="train", shard_lengths=[len(examples)], num_bytes=1, filename_template=template
        )
        tfds.folder_dataset.write_metadata(
            data_dir=folder, features=features, split_infos=[split], filename_template=template, check_data=False
        )
        return folder

    return write
