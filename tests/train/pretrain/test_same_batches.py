"""The script that writes batches for the reference runs, and each of its examples is alone in a row."""

import importlib.util
import json

import numpy as np


def test_batches_for_the_reference(workshop, repository, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    spec = importlib.util.spec_from_file_location("same_batches", repository / "bench" / "same_batches.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    given = dict(corpus=(str(workshop.folder / "corpus"),), steps=2, rows=2, length=32, vocab_size=120)
    settings = script.Settings(model="electra-tiny", out=tmp_path / "out", **given)
    assert script.main(settings) == 0
    written = json.loads((tmp_path / "out" / "losses.json").read_text())
    assert [len(written["losses"]), len(written["rates"]), written["objective"]] == [2, 2, "rtd"]
    batches = np.load(tmp_path / "out" / "batches.npz")
    for step, sums in enumerate(written["losses"]):
        mask, labels, replaced = (batches[f"{step}.{name}"] for name in ("attention_mask", "labels", "replaced"))
        assert mask.sum() == sums["tokens"]
        assert (np.diff(mask, axis=1) <= 0).all()  # of each row, the beginning
        assert np.isclose(replaced.sum() / mask.sum(), sums["replaced"])
        assert 0 < (labels >= 0).sum() < 0.2 * mask.sum() + len(mask)
        changed = batches[f"{step}.corrupted"] != batches[f"{step}.input_ids"]
        assert not (changed & (labels < 0)).any()
    assert (tmp_path / "out" / "generator" / "model.safetensors").is_file()
