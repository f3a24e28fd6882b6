"""Checkpoints that cannot be written, and those of another model."""

import dataclasses
import errno
import shutil

import jax
import jax.numpy as jnp
import pytest
from orbax.checkpoint.options import AtomicityMode

from bestiary.train import checkpoint
from bestiary.train.checkpoint import Checkpoints
from bestiary.train.errors import RunError


def state(**shapes: tuple[int, ...]) -> dict[str, jax.Array]:
    return {name: jnp.ones(shape) for name, shape in shapes.items()}


def abstract(tree: dict[str, jax.Array]) -> dict[str, jax.ShapeDtypeStruct]:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def test_a_save_on_a_full_disk_is_reported_and_the_last_one_stays(tmp_path, monkeypatch):
    said: list[str] = []
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2, report=said.append)
    whole = state(w=(4, 3))
    checkpoints.save(1, whole, {"at": 1})
    checkpoints.finish()
    full = OSError(errno.ENOSPC, "No space left on device")

    def no_space(*_: object, **__: object) -> None:
        raise full

    with monkeypatch.context() as patched:
        patched.setattr(type(checkpoints._manager), "save", no_space)
        checkpoints.save(2, whole, {"at": 2})
    assert len(said) == 1
    assert "CHECKPOINT OF STEP 2 NOT SAVED" in said[0]
    assert "the newest one is of step 1" in said[0]
    checkpoints.save(3, whole, {"at": 3})  # there is space again
    checkpoints.close()
    assert len(said) == 1
    again = Checkpoints(tmp_path / "checkpoints", keep=2, report=said.append)
    assert again.steps() == [1, 3]
    restored = again.restore(abstract(whole))
    assert restored is not None
    assert restored.extra_state == {"at": 3}
    again.close()
    assert len(said) == 1


def test_a_checkpoint_of_another_model_names_the_arrays_that_differ(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2, report=print)
    checkpoints.save(1, state(same=(2,), changed=(4, 3), gone=(5,)), {})
    checkpoints.finish()
    with pytest.raises(RunError) as refused:
        checkpoints.restore(abstract(state(same=(2,), changed=(4, 2), new=(1,))))
    checkpoints.close()
    assert "changed: [4, 3] there, [4, 2] here" in str(refused.value)
    assert "gone: [5] there, not there here" in str(refused.value)
    assert "new: not there there, [1] here" in str(refused.value)
    assert "same:" not in str(refused.value)


def test_several_processes_on_gs_read_what_one_has_saved(tmp_path, monkeypatch):
    """One process saves in a mirror, by renaming; on gs:// Orbax looks for its own mark."""
    whole, folder = state(w=(4, 3)), tmp_path / "checkpoints"
    there: list[bool] = []
    checkpoints = Checkpoints(folder, keep=2, report=print, before=lambda: there.append((folder / "1.json").exists()))
    checkpoints.save(1, whole, {})
    checkpoints.close()
    assert there == [False]
    on_gs = dataclasses.replace(checkpoint.RENAMED, mode=AtomicityMode.COMMIT_FILE)
    monkeypatch.setattr(checkpoint, "RENAMED", on_gs)
    again = Checkpoints(folder, keep=2, report=print)
    assert again.steps() == [1]
    assert again.restore(abstract(whole)) is not None
    again.close()
    named = checkpoint.restore_from(folder, abstract(whole), print)
    assert named.step == 1


def test_a_run_whose_checkpoints_are_gone_does_not_start_anew(tmp_path):
    whole, folder = state(w=(2,)), tmp_path / "checkpoints"
    checkpoints = Checkpoints(folder, keep=2, report=print)
    checkpoints.save(1, whole, {})
    checkpoints.close()
    shutil.rmtree(folder / "1")
    again = Checkpoints(folder, keep=2, report=print)
    with pytest.raises(RunError, match=r"has 1\.json, but the checkpoints are missing"):
        again.restore(abstract(whole))
    again.close()
    assert (folder / "1.json").exists()
