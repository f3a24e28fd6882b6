"""How the papers pretrained their families, as commands of this package, for the pages of the zoo.

Where a paper leaves a setting open, or this package has no such thing, the note says so. Vocabularies are trained on
the corpus, of the size that the paper has.
"""

from typing import NamedTuple


class Recipe(NamedTuple):
    """A paper's pretraining."""

    command: str
    note: str = ""
    small: str = ""
    """what runs a small one here, for a family without a pretraining objective"""


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
    "bilstm": Recipe(
        "bestiary finetune ner --data conll2003/ --features runs/elmo/model --vectors senna-50d.txt --model bilstm "
        "--crf --batch-size 64 --epochs 75 --learning-rate 1e-3 --warmup 0 --schedule constant --weight-decay 0 "
        "--clip-norm 5 --dropout 0.5 --patience 25 --out runs/lstm-crf",
        "The optimiser, batch, dropout and early stopping are those of AllenNLP's `ner_elmo.jsonnet`, which says that "
        "it differs from Peters et al. 2018 in having GloVe's vectors for Senna's; the numbers were not compared with "
        "the paper itself. That tagger has two layers, a convolution over characters beside each word's vector, and a "
        "penalty on the weights of the mix; the one here has one layer, and neither of these.",
        "bestiary finetune ner --data docs/examples/names --model bilstm --crf --epochs 4 --out runs/bilstm",
    ),
    "conv-vit": Recipe(
        "bestiary images train --data imagenet/train --eval-data imagenet/val --model conv-vit-small --layers 11 "
        "--epochs 400 --batch-size 2048 --learning-rate 1e-3 --schedule cosine --warmup 0.0125 --weight-decay 0.24 "
        "--no-independent-decay --clip-norm 0 --ema 0.9999 --label-smoothing 0.1 --crop inception --flip "
        "--randaugment 2 --mixup 0.8 --dropout 0 --out runs/conv-vit-small",
        "ViT-C of 4 GF (5.4 and 6), whose stem takes the place of a layer; the warmup is five epochs. The paper's "
        "feed-forward layers have three times the width, these have four times. Its AutoAugment and CutMix are not "
        "here: RandAugment stands for the first. Not given in the paper, and chosen here: the decay of the average of "
        "the weights, the crop and the flip, and that gradients are not clipped.",
        "bestiary images train --data docs/examples/shapes --model conv-vit-tiny --image-size 32 --patch-size 8 "
        "--batch-size 8 --epochs 2 --out runs/conv-vit-tiny",
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
    "marian": Recipe(
        "bestiary translate train --source train.en --target train.de --dev dev.en dev.de --preset "
        "transformer-base --vocab-size 32000 --no-joint --row-tokens 500 --batch-tokens 25000 --steps 600000 --dropout "
        "0.1 --schedule inverse_sqrt --learning-rate 3e-4 --warmup 16000 --beta2 0.98 --epsilon 1e-9 --clip-norm 5 "
        "--label-smoothing 0.1 --average 0 --ema 0.9999 --evaluate-every 10000 --patience 10 --out runs/opus-mt",
        "Not a paper's settings but the defaults of OPUS-MT's training scripts (OPUS-MT-train, `lib/train.mk` and "
        "`lib/config.mk`). Chosen here: the batch, which Marian fits to the memory, and the most steps, which the "
        "scripts leave to early stopping. They stop by the perplexity, where this command stops by BLEU; they join the "
        "two vocabularies and tie all embeddings, and most of their models are trained with word alignments, which "
        "are not here. Marian's Transformers are read and written as such; a new one is trained as the Transformer, "
        "and saved as Marian where that can represent it.",
        "bestiary translate train",
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
        small="bestiary images train --data docs/examples/shapes --model plain-vit-tiny --image-size 32 --patch-size 8 "
        "--batch-size 8 --epochs 2 --out runs/plain-vit-tiny",
    ),
    "recurrent": Recipe(
        "bestiary translate train --source train.en --target train.fr --dev dev.en dev.fr --languages en fr --preset "
        "rnnsearch --subwords word-bpe --vocab-size 30000 --no-joint --row-tokens 50 --batch-tokens 2400 --steps "
        "288000 --dropout 0 --label-smoothing 0 --learning-rate 5e-4 --warmup 4000 --clip-norm 1 --out runs/rnnsearch",
        "RNNsearch-50 (4.2, B.2 and table 2): 288,000 updates and a norm of at most 1. The paper has sentences of up "
        "to 50 whole words, the 30,000 most frequent of each language; here both are of tokens. Its 80 pairs a step "
        "are about 2,400 tokens, by an estimate, since short pairs share a row. Its optimiser, Adadelta (ε 1e-6, ρ "
        "0.95), is not here: Adam, its learning rate, warmup and schedule are chosen here.",
        "bestiary translate train --preset gru-attention --steps 300 --out runs/gru-attention",
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
        small="bestiary translate train",
    ),
    "unit": Recipe(
        "bestiary multitask train --config unit.toml --steps 500000 --batch-size 64 --learning-rate 5e-5 --schedule "
        "cosine --warmup 2000 --epsilon 1e-8 --weight-decay 1e-4 --clip-norm 0.1 --out runs/unit",
        "The released code's settings of all eight tasks (MMF, `all_8_datasets/shared_dec.yaml`). In "
        "unit.toml, each with `queries = 25`, their `share` is "
        "0.26 for VQA 2, 0.12 for visual entailment, 0.1 for QNLI, MNLI and QQP, and 0.05 for SST-2; the two of "
        "detection, 0.2 and 0.07, are not here, and the images' encoder is a ViT. The code's ResNet starts from "
        "DETR's, with a learning rate of its own, 1e-5, which is not here. `docs/examples/tasks.toml` is a file of "
        "this kind.",
        "bestiary multitask train --config docs/examples/tasks.toml --batch-size 8 --steps 20 --out runs/unit",
    ),
    "vit": Recipe(
        "bestiary images train --data imagenet/train --eval-data imagenet/val --model vit-base --epochs 300 "
        "--batch-size 4096 --learning-rate 3e-3 --schedule cosine --warmup 10000 --weight-decay 0.3 "
        "--no-independent-decay --clip-norm 1 --crop inception --flip --dropout 0.1 --out runs/vit-base",
        "The paper's models from ImageNet alone; its best ones were pretrained on larger sets and fine-tuned.",
        small="bestiary images train --data docs/examples/shapes --model vit-tiny --image-size 32 --patch-size 8 "
        "--batch-size 8 --epochs 2 --out runs/vit-tiny",
    ),
    "xlm-roberta": Recipe(
        "bestiary pretrain --model xlm-roberta-base --objective mlm --corpus cc100/ --vocab-size 250000 "
        "--no-lowercase --sequence-length 512 --batch-tokens 4194304 --steps 1500000 --beta2 0.98 --clip-norm 0 "
        "--learning-rate 7e-4 --warmup 10000 --out runs/xlm-roberta-base",
        "The paper gives the steps, the batch and the vocabulary, and samples languages by the 0.3rd power of "
        "their share; the learning rate here is a choice.",
    ),
}
