#!/usr/bin/env python3
"""Train the reference on the batches that bench/same_batches.py wrote, and print how far its losses are from ours.

    python3 bench/same_batches_torch.py DIR...

Needs torch, transformers and safetensors, and nothing of this project. The span boundary head and ELECTRA's pair of
networks, which transformers does not have, are written out here after the originals.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional


class Boundaries(nn.Module):
    """Span boundary head, after SpanBERT's pair_bert.py."""

    def __init__(self, tensors, epsilon, decoder):
        super().__init__()
        part = {
            name.removeprefix("cls.pair_target_predictions."): value
            for name, value in tensors.items()
            if "pair_" in name
        }
        self.position = nn.Embedding.from_pretrained(part["position_embeddings.weight"], freeze=False)
        for number in (1, 2):
            weight = part[f"mlp_layer_norm.linear{number}.weight"]
            linear, norm = nn.Linear(weight.shape[1], weight.shape[0]), nn.LayerNorm(len(weight), eps=epsilon)
            for module, name in ((linear, "linear"), (norm, "layer_norm")):
                module.load_state_dict({w: part[f"mlp_layer_norm.{name}{number}.{w}"] for w in ("weight", "bias")})
            setattr(self, f"linear{number}", linear)
            setattr(self, f"norm{number}", norm)
        self.bias, self.decoder = nn.Parameter(part["bias"]), [decoder]

    def forward(self, left, right, offsets):
        hidden = torch.cat([left, right, self.position(offsets)], -1)
        for linear, norm in ((self.linear1, self.norm1), (self.linear2, self.norm2)):
            hidden = norm(functional.gelu(linear(hidden)))
        return hidden @ self.decoder[0].weight.T + self.bias


def masked(logits, labels):
    return functional.cross_entropy(logits.flatten(0, 1), labels.flatten().long(), ignore_index=-100)


class Losses(nn.Module):
    """A family's model, and the loss of a batch."""

    def __init__(self, folder, objective):
        super().__init__()
        self.objective, model = objective, folder / "model"
        stored = json.loads((model / "config.json").read_text())
        options = dict(attn_implementation="sdpa")
        if objective == "rtd":
            self.net = transformers.ElectraForPreTraining.from_pretrained(model, **options)
            self.generator = transformers.ElectraForMaskedLM.from_pretrained(folder / "generator", **options)
            shared, own = self.net.electra.embeddings, self.generator.electra.embeddings
            assert all(torch.equal(a, b) for a, b in zip(shared.parameters(), own.parameters(), strict=True))
            self.generator.electra.embeddings = shared
            self.generator.generator_lm_head.weight = shared.word_embeddings.weight
        elif objective == "span+sbo":
            stored |= {"architectures": ["BertForMaskedLM"]}
            self.net = transformers.BertForMaskedLM.from_pretrained(model, **options)
            decoder = self.net.bert.embeddings.word_embeddings
            self.sbo = Boundaries(load_file(model / "model.safetensors"), self.net.config.layer_norm_eps, decoder)
        elif objective == "mlm+sop":
            self.net = transformers.AlbertForPreTraining.from_pretrained(model, **options)
        elif objective == "causal":
            self.net = transformers.AutoModelForCausalLM.from_pretrained(model, **options)
        else:
            self.net = transformers.AutoModelForMaskedLM.from_pretrained(model, **options)
        self.types = stored.get("type_vocab_size", 0) > 1
        for part in self.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0

    def forward(self, batch):
        given = {"attention_mask": batch["attention_mask"]}
        if self.types and "token_type_ids" in batch:
            given["token_type_ids"] = batch["token_type_ids"]
        if self.objective == "rtd":
            words = masked(self.generator(input_ids=batch["input_ids"], **given).logits, batch["labels"])
            logits, real = self.net(input_ids=batch["corrupted"], **given).logits, batch["attention_mask"].bool()
            found = functional.binary_cross_entropy_with_logits(logits[real], batch["replaced"][real].float())
            return words + 50 * found
        if self.objective == "span+sbo":
            hidden = self.net.bert(input_ids=batch["input_ids"], **given).last_hidden_state
            words = masked(self.net.cls(hidden), batch["labels"])
            rows, places = torch.nonzero(batch["sbo_left"] >= 0, as_tuple=True)
            left, right, offsets = (batch[f"sbo_{name}"][rows, places].long() for name in ("left", "right", "offsets"))
            logits = self.sbo(hidden[rows, left], hidden[rows, right], offsets)
            total = functional.cross_entropy(logits, batch["labels"][rows, places].long(), reduction="sum")
            return words + total / (len(rows) + 1)
        out = self.net(input_ids=batch["input_ids"], **given)
        if self.objective == "mlm+sop":
            order = functional.cross_entropy(out.sop_logits, batch["sentence_order_label"].long())
            return masked(out.prediction_logits, batch["labels"]) + order
        return masked(out.logits, batch["labels"])


def main() -> None:
    for folder in map(Path, sys.argv[1:]):
        ours = json.loads((folder / "losses.json").read_text())
        stored = np.load(folder / "batches.npz")
        model, optim = Losses(folder, ours["objective"]).train(), ours["optim"]
        parameters = list({id(p): p for p in model.parameters()}.values())
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": optim["weight_decay"]},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        adam = torch.optim.AdamW(groups, betas=(optim["beta1"], optim["beta2"]), eps=optim["epsilon"])
        errors = []
        for number, rate in enumerate(ours["rates"]):
            start = f"{number}."
            names = [name for name in stored.files if name.startswith(start)]
            batch = {name.removeprefix(start): torch.from_numpy(stored[name]) for name in names}
            batch = {name: value.long() for name, value in batch.items()}
            for group in adam.param_groups:
                group["lr"] = rate
            loss = model(batch)
            errors.append(abs(loss.item() / ours["losses"][number]["loss"] - 1))
            adam.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, optim["clip_norm"])
            adam.step()
        first, last = ours["losses"][0]["loss"], ours["losses"][-1]["loss"]
        print(
            f"{ours['model']} ({ours['objective']}): {len(errors)} losses from {first:.4f} to {last:.4f}; largest "
            f"relative difference {max(errors):.1e} at step {errors.index(max(errors)) + 1}, first {errors[0]:.1e}",
            flush=True,
        )


if __name__ == "__main__":
    main()
