"""A kernel that has not run on a chip is selected automatically only if it agrees with the reference."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bestiary.kernels import BACKENDS, attention, backends, selfcheck, xla


class Kernel:
    """The reference, with a fault."""

    def __init__(self, fault=lambda call, results: results):
        self.fault, self.calls = fault, 0

    def supports(self, call):
        return None

    def run(self, call):
        self.calls += 1
        return self.fault(call, xla.run(call))


def broken(call, results):
    raise RuntimeError("an illegal instruction")


def leaks(call, results):
    """Right in every output but of the last rows of long inputs."""
    out, lse = results
    return (out.at[:, -20:].multiply(1.05) if out.shape[1] == max(selfcheck.LENGTHS) else out), lse


def wrong_gradient(call, results):
    """The right output, but nothing flows back to the values."""
    return xla.run(dataclasses.replace(call, value=jax.lax.stop_gradient(call.value)))


compute, KNOWN = selfcheck._run, {}


def compute_once(name, dtype, inputs):
    """What the reference gives does not depend on the kernel beside it."""
    if name != "xla":
        return compute(name, dtype, inputs)
    key = dtype, inputs["query"].shape
    if key not in KNOWN:
        KNOWN[key] = compute(name, dtype, inputs)
    return KNOWN[key]


@pytest.fixture
def offer(monkeypatch):
    """Puts an unproven kernel before the reference, to be compared on shorter rows than a chip's own blocks ask for."""
    selfcheck.agrees.cache_clear()
    monkeypatch.setattr(selfcheck, "LENGTHS", {24: 2, 72: 1})
    monkeypatch.setattr(selfcheck, "_run", compute_once)

    def put(kernel):
        monkeypatch.setattr(backends, "BACKENDS", {"new": kernel, "xla": BACKENDS["xla"]})
        monkeypatch.setattr(backends, "NEEDS_SELF_CHECK", frozenset({"new"}))

    yield put
    selfcheck.agrees.cache_clear()


@pytest.fixture
def arrays():
    return [jnp.asarray(np.random.default_rng(n).normal(size=(1, 8, 2, 8)), jnp.bfloat16) for n in range(3)]


def test_taken_where_it_agrees(offer, arrays):
    kernel = Kernel()
    offer(kernel)
    jax.jit(attention)(*arrays)  # asked while a program is being traced
    checked = kernel.calls
    assert checked == len(selfcheck.LENGTHS) + 1
    jax.jit(lambda *a: attention(*a, causal=True))(*arrays)
    assert kernel.calls == checked + 1  # compared once


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (broken, "illegal instruction"),
        (leaks, "its output has an error of"),
        (wrong_gradient, "its gradient of value has an error"),
    ],
)
def test_left_out_where_it_does_not(offer, arrays, fault, message):
    offer(Kernel(fault))
    with pytest.warns(RuntimeWarning, match=message):
        found = attention(*arrays)
    np.testing.assert_array_equal(found, attention(*arrays, implementation="xla"))
