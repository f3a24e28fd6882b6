"""What the conformance suite does not ask of the XLA backend: what it keeps for the backward pass."""

import jax
import jax.numpy as jnp

from bestiary.kernels import attention


def test_nothing_of_the_scores_size_is_kept_for_the_backward_pass():
    arrays = [jax.ShapeDtypeStruct((1, 64, 2, 8), jnp.float32)] * 3
    ids, seed = jnp.ones((1, 64), jnp.int32), jnp.zeros(2, jnp.uint32)
    options = dict(query_segment_ids=ids, key_segment_ids=ids, dropout_rate=0.1, dropout_seed=seed)

    def pull(*primals):
        return jax.vjp(lambda *primals: attention(*primals, **options, implementation="xla"), *primals)[1]

    kept = [x.size for x in jax.tree.leaves(jax.eval_shape(pull, *arrays))]
    assert kept
    assert max(kept) < 64 * 64
