"""Train a small Transformer-XL on characters by its authors' recipe, in PyTorch, and measure such models.

    python3 bench/transformer_xl_torch.py train --seed 0 --tokenizer CHARACTERS --data wikitext2 --out DIR
    python3 bench/transformer_xl_torch.py measure DIR runs/xl/model --tokenizer CHARACTERS --data wikitext2

Needs torch, and transformers 4.35.2, the last with the class. CHARACTERS is a folder that `bestiary tokenizer train
--kind characters` wrote. The recipe is that of kimiyoung/transformer-xl, pytorch/run_enwik8_base.sh: Adam, cosine
without warmup, clipped at 0.25, dropout of 0.1 but not of attention. `measure` prints nats a character of 200,000
characters of the validation text, in eight parts, in windows of 128 with a memory of 128.
"""

import argparse
import json
import math
from pathlib import Path

import torch
from transformers import TransfoXLConfig, TransfoXLLMHeadModel

ROWS, LENGTH, MEASURED = 8, 128, 200_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", choices=("train", "measure"))
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    if a.work == "train" and a.out is None:
        parser.error("train needs --out, the folder for the model")
    torch.set_num_threads(1)
    vocabulary = json.loads((a.tokenizer / "vocab.json").read_text())
    if a.work == "train":
        model = train(read(a.data / "wiki.train.tokens", vocabulary), len(vocabulary), a.seed, a.steps)
        model.save_pretrained(a.out)
    else:
        text = read(a.data / "wiki.valid.tokens", vocabulary)[:MEASURED]
        for folder in a.models:
            model = TransfoXLLMHeadModel.from_pretrained(folder)
            print(folder, round(measure(model, text), 4), flush=True)


def read(path: Path, vocabulary: dict[str, int]) -> torch.Tensor:
    """Return the ids of a text's characters."""
    unknown = vocabulary.get("<unk>", 0)
    return torch.tensor([vocabulary.get(character, unknown) for character in path.read_text(encoding="utf-8")])


def train(ids: torch.Tensor, words: int, seed: int, steps: int) -> TransfoXLLMHeadModel:
    """Train a new model on the text in `ROWS` columns, a window of each per step."""
    torch.manual_seed(seed)
    sizes = {"d_model": 192, "d_embed": 192, "n_head": 6, "d_head": 32, "d_inner": 512, "n_layer": 4, "mem_len": LENGTH}
    model = TransfoXLLMHeadModel(
        TransfoXLConfig(vocab_size=words, cutoffs=[], div_val=1, clamp_len=-1, dropout=0.1, dropatt=0.0, **sizes)
    )
    columns = ids[: len(ids) // ROWS * ROWS].view(ROWS, -1)
    optimizer, memory = torch.optim.Adam(model.parameters(), lr=1e-3), None
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps)))
    for step in range(steps):
        loss, memory = loss_of(model, columns, step * LENGTH, memory)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.25)
        optimizer.step()
        schedule.step()
        if (step + 1) % 50 == 0:
            print(json.dumps({"step": step + 1, "loss": loss.item()}), flush=True)
    return model


def measure(model: TransfoXLLMHeadModel, ids: torch.Tensor) -> float:
    """Return the mean of the windows' losses, with the memory carried."""
    columns, memory, losses = ids[: len(ids) // ROWS * ROWS].view(ROWS, -1), None, []
    model.eval()
    model.transformer.mem_len = LENGTH
    with torch.no_grad():
        for start in range(0, columns.shape[1] - LENGTH, LENGTH):
            loss, memory = loss_of(model, columns, start, memory)
            losses.append(loss.item())
    return sum(losses) / len(losses)


def loss_of(
    model: TransfoXLLMHeadModel, columns: torch.Tensor, start: int, memory: list[torch.Tensor] | None
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the loss of a window of every column, whose last character is predicted too, and the memory after it."""
    found = model.transformer(columns[:, start : start + LENGTH], mems=memory)
    logarithms = model.crit(found.last_hidden_state.flatten(0, 1))
    return torch.nn.functional.nll_loss(logarithms, columns[:, start + 1 : start + LENGTH + 1].flatten()), found.mems


if __name__ == "__main__":
    main()
