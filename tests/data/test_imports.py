"""What importing costs: a command's --help must not wait for libraries that only its work needs."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("code", "forbidden"),
    [
        ("import bestiary.data", {"jax", "grain", "tensorflow_datasets", "tokenizers", "numpy"}),
        (
            "from bestiary.data import Corpus, SentencePairRows, build_documents, load_tokenizer, train_wordpiece;"
            "import bestiary.data.store_build",
            {"jax", "grain", "tensorflow_datasets", "tensorflow"},
        ),
    ],
)
def test_imports_stay_light(code: str, forbidden: set[str]):
    code += f"; import sys; print(sorted({forbidden!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_is_there():
    import bestiary.data

    assert set(bestiary.data.__all__) == set(dir(bestiary.data))
    for name in bestiary.data.__all__:
        assert getattr(bestiary.data, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        bestiary.data.nothing  # noqa: B018
