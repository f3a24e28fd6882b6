"""How the papers pretrained their families, as commands of this package, for the pages of the zoo.

Where a paper leaves a setting open, or this package has no such thing, the note says so. Vocabularies are trained on
the corpus, of the size that the paper has.
"""

from typing import NamedTuple


class Recipe(NamedTuple):
    """A paper's pretraining."""

    command: str
    note: str = ""


RECIPES = {
    "albert": Recipe(
        "bestiary pretrain --model albert-base-v1 --objective mlm+sop --masking ngram --corpus wikipedia/ books/ "
        "--vocab-size 30000 --sequence-length 512 --batch-tokens 2097152 --steps 125000 --optimizer lamb "
        "--learning-rate 1.76e-3 --warmup 3125 --no-bias-correction --out runs/albert-base",
        "Version 2 of the released models has no dropout (`--model albert-base --dropout 0`), more text and more "
        "steps.",
    ),
    "bart": Recipe(
        "bestiary pretrain --model bart-large --objective denoise --corpus texts/ --vocab-size 50265 "
        "--sequence-length 512 --batch-tokens 4096000 --steps 500000 --learning-rate 4e-4 --warmup 10000 "
        "--clip-norm 0.1 --out runs/bart-large",
        "The paper stops the dropout for the last tenth of the steps: a second run with `--dropout 0 --resume-from`.",
    ),
    "bert": Recipe(
        "bestiary pretrain --model bert-base --objective mlm+nsp --corpus wikipedia/ books/ --vocab-size 30522 "
        "--phases 128:900000 512:100000 --batch-tokens 131072 --batch-ramp 32768:900000 --learning-rate 1e-4 "
        "--warmup 10000 --no-bias-correction --static-masks 10 --out runs/bert-base",
        "256 rows a step in both phases.",
    ),
    "distilbert": Recipe(
        "bestiary distill --teacher bert-base/ --model distilbert-base --corpus wikipedia/ books/ "
        "--sequence-length 512 --batch-tokens 1024000 --steps 12000 --out runs/distilbert",
        "Three epochs of the text, which are about 12,000 steps; the losses and the optimiser are the defaults.",
    ),
    "electra": Recipe(
        "bestiary pretrain --model electra-small --objective rtd --corpus wikipedia/ books/ --vocab-size 30522 "
        "--sequence-length 128 --batch-tokens 16384 --steps 1000000 --learning-rate 5e-4 --warmup 10000 "
        "--no-bias-correction --out runs/electra-small",
    ),
    "elmo": Recipe(
        "bestiary pretrain --model elmo-original --objective bilm --corpus one-billion-words/ --sequence-length 20 "
        "--batch-tokens 2560 --steps 3000000 --optimizer adamw --schedule constant --warmup 0 "
        "--learning-rate 1e-3 --weight-decay 0 --clip-norm 10 --out runs/elmo",
        "Ten epochs of the 1 Billion Word Benchmark; the authors' optimiser is Adagrad with a rate of 0.2, which is "
        "not here.",
    ),
    "gpt2": Recipe(
        "bestiary pretrain --model gpt2-small --objective causal --corpus webtext/ --vocab-size 50257 "
        "--sequence-length 1024 --batch-tokens 524288 --steps 600000 --learning-rate 6e-4 --schedule cosine "
        "--warmup 2000 --beta2 0.95 --epsilon 1e-8 --weight-decay 0.1 --out runs/gpt2-small",
        "The paper gives the length and the batch; the optimiser's settings are those of nanoGPT's replication, "
        "whose learning rate ends at a tenth of its peak.",
    ),
    "gpt3": Recipe(
        "bestiary pretrain --model gpt3-small --objective causal --corpus texts/ --vocab-size 50257 "
        "--sequence-length 2048 --batch-tokens 524288 --steps 572000 --learning-rate 6e-4 --schedule cosine "
        "--warmup 715 --beta2 0.95 --epsilon 1e-8 --weight-decay 0.1 --dropout 0 --out runs/gpt3-small",
        "300 billion tokens. The paper's learning rate ends at a tenth of its peak, and its batch grows from "
        "32,000 tokens over the first 4 to 12 billion (`--batch-ramp`).",
    ),
    "gpt_neo": Recipe(
        "bestiary pretrain --model gpt-neo-125m --objective causal --corpus pile/ --vocab-size 50257 "
        "--sequence-length 2048 --batch-tokens 524288 --steps 572300 --learning-rate 6e-4 --schedule cosine "
        "--warmup 3000 --beta2 0.95 --epsilon 1e-8 --weight-decay 0.1 --dropout 0 --out runs/gpt-neo-125m",
    ),
    "modernbert": Recipe(
        "bestiary pretrain --model modernbert-base --objective mlm --corpus texts/ --vocab-size 50280 "
        "--sequence-length 1024 --batch-tokens 4718592 --batch-ramp 786432:63578 --steps 417285 --optimizer "
        "stable-adamw --learning-rate 8e-4 --schedule constant --warmup 3815 --beta2 0.98 --weight-decay 1e-5 "
        "--independent-decay --out runs/modernbert-base",
        "The first of three phases, 1.7 trillion tokens; the authors' batch grows in several stages over the "
        "first 50 billion. Then 8,192 tokens and a constant 3e-4, and a decay by `--schedule wsd`.",
    ),
    "mt5": Recipe(
        "bestiary pretrain --model mt5-base --objective span-corruption --corpus mc4/ --vocab-size 250000 "
        "--sequence-length 1024 --batch-tokens 1048576 --steps 1000000 --dropout 0 --optimizer adafactor "
        "--schedule t5 --learning-rate 0.01 --warmup 0 --clip-norm 0 --weight-decay 0 --z-loss 1e-4 --out "
        "runs/mt5-base",
    ),
    "openai-gpt": Recipe(
        "bestiary pretrain --model openai-gpt --objective causal --corpus books/ --vocab-size 40478 "
        "--sequence-length 512 --batch-tokens 32768 --steps 3000000 --learning-rate 2.5e-4 --schedule cosine "
        "--warmup 2000 --epsilon 1e-8 --no-across-documents --out runs/gpt",
        "100 epochs of its books, which are about 3 million steps.",
    ),
    "plain-vit": Recipe(
        "bestiary images train --data imagenet/train --eval-data imagenet/val --model plain-vit-small --epochs 90 "
        "--batch-size 1024 --learning-rate 1e-3 --schedule cosine --warmup 10000 --weight-decay 1e-4 "
        "--independent-decay --no-decay-embeddings --clip-norm 1 --crop inception --flip --randaugment 2 "
        "--magnitude 10 --mixup 0.2 --dropout 0 --out runs/plain-vit-small",
    ),
    "roberta": Recipe(
        "bestiary pretrain --model roberta-base --objective mlm --rows full-sentences --corpus texts/ "
        "--vocab-size 50265 --sequence-length 512 --batch-tokens 4194304 --steps 500000 --learning-rate 6e-4 "
        "--warmup 24000 --beta2 0.98 --clip-norm 0 --out runs/roberta-base",
    ),
    "spanbert": Recipe(
        "bestiary pretrain --model spanbert-base --objective span+sbo --corpus wikipedia/ books/ --vocab-size "
        "28996 --no-lowercase --sequence-length 512 --batch-tokens 131072 --steps 2400000 --learning-rate 1e-4 "
        "--warmup 10000 --epsilon 1e-8 --out runs/spanbert-base",
    ),
    "t5": Recipe(
        "bestiary pretrain --model t5-base --objective span-corruption --corpus c4/ --vocab-size 32000 "
        "--sequence-length 512 --batch-tokens 65536 --steps 524288 --optimizer adafactor --schedule t5 "
        "--learning-rate 0.01 --warmup 0 --clip-norm 0 --weight-decay 0 --z-loss 1e-4 --shared-dropout --out "
        "runs/t5-base",
        "Versions 1.1 are pretrained with `--dropout 0`.",
    ),
    "transfo-xl": Recipe(
        "bestiary pretrain --model transformer-xl-base --objective causal+memory --corpus wikitext-103/ "
        "--sequence-length 150 --memory 150 --batch-tokens 9000 --steps 200000 --learning-rate 2.5e-4 --schedule "
        "cosine --warmup 0 --epsilon 1e-8 --weight-decay 0 --clip-norm 0.25 --out runs/transformer-xl",
    ),
    "transformer": Recipe(
        "bestiary translate train --source train.en --target train.de --dev dev.en dev.de --preset "
        "transformer-base --subwords bpe --vocab-size 37000 --batch-tokens 25088 --steps 100000 --schedule "
        "inverse_sqrt --learning-rate 7e-4 --warmup 4000 --average 5 --out runs/transformer-base",
        "The paper's learning rate, width^-0.5 / sqrt(step), is 7e-4 at the end of the warmup.",
    ),
    "vit": Recipe(
        "bestiary images train --data imagenet/train --eval-data imagenet/val --model vit-base --epochs 300 "
        "--batch-size 4096 --learning-rate 3e-3 --schedule cosine --warmup 10000 --weight-decay 0.3 --clip-norm 1 "
        "--crop inception --flip --dropout 0.1 --out runs/vit-base",
        "The paper's models from ImageNet alone; its best ones were pretrained on larger sets and fine-tuned.",
    ),
    "xlm-roberta": Recipe(
        "bestiary pretrain --model xlm-roberta-base --objective mlm --corpus cc100/ --vocab-size 250000 "
        "--no-lowercase --sequence-length 512 --batch-tokens 4194304 --steps 1500000 --beta2 0.98 --clip-norm 0 "
        "--learning-rate 7e-4 --warmup 10000 --out runs/xlm-roberta-base",
        "The paper gives the steps, the batch and the vocabulary, and samples languages by the 0.3rd power of "
        "their share; the learning rate here is a choice.",
    ),
}
