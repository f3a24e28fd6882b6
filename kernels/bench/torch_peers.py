"""PyTorch as contestants: each backend of scaled_dot_product_attention by name, varlen_attn and flex_attention."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..bias import relative_position_bucket
from .cases import BUCKETS, Arrays, Case, documents
from .runner import Refused
from .timing import Seconds

TORCH = {
    "torch sdpa flash": "FLASH_ATTENTION",
    "torch sdpa cudnn": "CUDNN_ATTENTION",
    "torch sdpa efficient": "EFFICIENT_ATTENTION",
    "torch sdpa math": "MATH",
    "torch varlen": "varlen",
    "torch flex": "flex",
}
"""Contestants, and what they are in PyTorch: a member of SDPBackend, or a function of its own."""


class TorchRunner:
    """Runner of one of PyTorch's functions, on its own device. See `Runner`."""

    def __init__(self, name: str, case: Case, sets: Sequence[Arrays], timing: dict[str, Any]) -> None:
        import torch  # pyright: ignore[reportMissingImports]

        if jax.default_backend() == "tpu":
            raise Refused("runs on no TPU")
        if jax.default_backend() == "gpu" and not torch.cuda.is_available():
            raise Refused("is installed without CUDA")
        self.torch, self.case, self.timing = torch, case, timing
        self.device = "cuda" if jax.default_backend() == "gpu" else "cpu"
        self.kind = TORCH[name]
        ids = None if sets[0].segment_ids is None else np.asarray(sets[0].segment_ids)
        if self.kind in ("varlen", "flex"):
            if self.device == "cpu":
                raise Refused("needs an NVIDIA GPU")
            if self.kind == "varlen" and (ids is None or case.bias != "none"):
                raise Refused("is for packed rows without a bias")
            if self.kind == "flex" and case.bias == "dense":
                raise Refused("takes a bias as a function of the positions")
        self.packed = self._packing(ids) if self.kind == "varlen" and ids is not None else None
        self.flex = self._flex(ids) if self.kind == "flex" else None
        self.sets = [self._inputs(inputs) for inputs in sets]

    def _tensor(self, x: Any, dtype: Any = None) -> Any:
        """Copy an array to PyTorch through the host, since the two libraries share no device memory."""
        return self.torch.tensor(np.asarray(x.astype(jnp.float32))).to(self.device, dtype or self.torch.float32)

    def _inputs(self, inputs: Arrays) -> Any:
        torch = self.torch
        dtype = getattr(torch, self.case.dtype)

        def laid_out(x: Any) -> Any:
            """[B, H, L, D], contiguous, as in a model that has transposed once; or [tokens, H, D], documents alone."""
            if self.packed is None:
                return self._tensor(jnp.swapaxes(x, 1, 2), dtype).contiguous()
            return self._tensor(x, dtype).flatten(0, 1)[self.packed["places"]].contiguous()

        parts = [laid_out(x).requires_grad_() for x in (inputs.query, inputs.key, inputs.value)]
        if inputs.parameter is not None:
            parts.append(self._tensor(inputs.parameter).requires_grad_())
        ids = None if inputs.segment_ids is None else torch.tensor(np.asarray(inputs.segment_ids), device=self.device)
        return parts, laid_out(inputs.wave), ids

    def _packing(self, ids: np.ndarray) -> dict[str, Any]:
        """Return where the tokens of documents are in the rows, flattened, and the documents' cumulative lengths."""
        lengths = documents(ids).lengths
        ends = np.cumsum(lengths[lengths > 0])
        return {
            "places": self.torch.tensor(np.flatnonzero(ids.reshape(-1)), device=self.device),
            "ends": self.torch.tensor(np.concatenate([[0], ends]).astype(np.int32), device=self.device),
            "longest": int(lengths.max()),
        }

    def _flex(self, ids: np.ndarray | None) -> Any:
        """Compile flex_attention, with a block mask of the documents, causality and the window."""
        torch, case = self.torch, self.case
        from torch.nn.attention import flex_attention as flex  # pyright: ignore[reportMissingImports]

        left, right = case.sides
        rows = None if ids is None else torch.tensor(ids, device=self.device)

        def seen(b: Any, _h: Any, q: Any, k: Any) -> Any:
            answer = q >= 0
            if rows is not None:
                answer = answer & (rows[b, q] == rows[b, k])
            if left is not None:
                answer = answer & (k >= q - left)
            if right is not None:
                answer = answer & (k <= q + right)
            return answer

        mask = None
        if rows is not None or case.sides != (None, None):
            batch = None if rows is None else case.batch
            mask = flex.create_block_mask(seen, batch, None, case.queries, case.keys, device=self.device)
        attend = torch.compile(flex.flex_attention)
        buckets = self._buckets() if case.bias == "relative" else None

        def run(query: Any, key: Any, value: Any, *parameter: Any) -> Any:
            def score(s: Any, _b: Any, h: Any, q: Any, k: Any) -> Any:
                if buckets is not None:
                    return s + parameter[0][buckets[k - q + case.queries - 1], h]
                return s - parameter[0][h] * (k - q).abs()

            grouped = case.heads != case.key_heads
            return attend(query, key, value, score if parameter else None, mask, enable_gqa=grouped)

        return run

    def _buckets(self) -> Any:
        """Return the bucket of each distance key - query, from 1 - L on."""
        distance = jnp.arange(1 - self.case.queries, self.case.keys)
        bucket = relative_position_bucket(distance, bidirectional=True, buckets=BUCKETS, max_distance=128)
        return self.torch.tensor(np.array(bucket), device=self.device)

    def _bias(self, parameter: Any) -> Any:
        torch, case = self.torch, self.case
        if case.bias == "dense":
            return parameter
        distance = jnp.arange(case.keys)[None] - jnp.arange(case.queries)[:, None]
        if case.bias == "alibi":
            steps = torch.tensor(np.array(jnp.abs(distance)), device=self.device)
            return (-parameter[:, None, None] * steps)[None]
        chosen = torch.nn.functional.embedding(
            self._buckets()[torch.tensor(np.array(distance)) + case.queries - 1], parameter
        )
        return chosen.permute(2, 0, 1)[None]

    def _attend(self, parts: Any, ids: Any) -> Any:
        torch, case = self.torch, self.case
        query, key, value, *parameter = parts
        if self.flex is not None:
            return self.flex(query, key, value, *parameter)
        if self.packed is not None:
            from torch.nn.attention.varlen import varlen_attn  # pyright: ignore[reportMissingImports]

            left, right = (-1 if side is None else side for side in case.sides)
            ends, longest = self.packed["ends"], self.packed["longest"]
            grouped = case.heads != case.key_heads
            return varlen_attn(
                query, key, value, ends, ends, longest, longest, window_size=(left, right), enable_gqa=grouped
            )
        mask = None if ids is None else (ids[:, :, None] == ids[:, None, :])[:, None]
        causal = case.causal
        windowed = case.window != (None, None)
        if windowed or (causal and (parameter or mask is not None)):  # It supports a mask or causality, not both.
            left, right = case.sides
            seen = torch.ones(case.queries, case.keys, dtype=torch.bool, device=self.device)
            seen = seen if left is None else seen.triu(-left)
            seen = seen if right is None else seen.tril(right)
            mask, causal = seen if mask is None else mask & seen, False
        if parameter:
            bias = self._bias(parameter[0]).to(query.dtype)
            mask = bias if mask is None else bias.masked_fill(~mask, float("-inf"))
        from torch.nn.attention import SDPBackend, sdpa_kernel  # pyright: ignore[reportMissingImports]

        with sdpa_kernel(getattr(SDPBackend, self.kind)):  # raises if that one does not support the call
            return torch.nn.functional.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, is_causal=causal, enable_gqa=case.heads != case.key_heads
            )

    def results(self) -> dict[str, np.ndarray]:
        parts, wave, ids = self.sets[0]
        out = self._attend(parts, ids)
        gradients = self.torch.autograd.grad(out, parts, wave)
        names = ("query", "key", "value", "bias")[: len(parts)]
        found = {"output": out, **dict(zip(names, gradients, strict=True))}
        arrays = {name: x.detach().float().cpu().numpy() for name, x in found.items()}
        return {name: x if name == "bias" else self._in_rows(x, ids) for name, x in arrays.items()}

    def _in_rows(self, x: np.ndarray, ids: Any) -> np.ndarray:
        """Return [B, L, H, D], with zeros at padding."""
        case = self.case
        if self.packed is not None:
            rows = np.zeros((case.batch * case.queries, *x.shape[1:]), np.float32)
            rows[self.packed["places"].cpu().numpy()] = x
            return rows.reshape(case.batch, case.queries, *x.shape[1:])
        x = x.swapaxes(1, 2)
        return x if ids is None else np.where((ids == 0).cpu().numpy()[:, :, None, None], 0, x)

    def _timed(self, call: Callable[[Any], Any], sets: Sequence[Any]) -> Seconds:
        torch, samples, least = self.torch, self.timing["samples"], self.timing["least_seconds"]

        def once(rounds: int) -> float:
            if self.device == "cpu":
                clock = time.perf_counter()
                for _ in range(rounds):
                    for inputs in sets:
                        call(inputs)
                return time.perf_counter() - clock
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(rounds):
                for inputs in sets:
                    call(inputs)
            end.record()
            end.synchronize()
            return begin.elapsed_time(end) / 1e3

        once(1)
        rounds = max(1, min(64, round(least / max(once(1), 1e-9))))
        found = [once(rounds) / (rounds * len(sets)) for _ in range(samples)]
        return Seconds(statistics.median(found), min(found), max(found))

    def forward(self) -> Seconds:
        with self.torch.no_grad():
            return self._timed(lambda inputs: self._attend(inputs[0], inputs[2]), self.sets)

    def backward(self) -> Seconds:
        sets = [(self._attend(parts, ids), parts, wave) for parts, wave, ids in self.sets]
        return self._timed(
            lambda inputs: self.torch.autograd.grad(inputs[0], inputs[1], inputs[2], retain_graph=True), sets
        )
