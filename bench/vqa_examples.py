"""Draw questions of easy-VQA's test set, and what a model of `bestiary multitask train` answers.

python bench/vqa_examples.py runs/unit DATA bench/vqa.png
"""

import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from bestiary.data.multitask.questions import read_questions
from bestiary.train.multitask.config import PredictConfig
from bestiary.train.multitask.predict import main

ROWS, COLUMNS, TRIED = 3, 5, 400


def draw(run: Path, data: Path, out: Path) -> None:
    """Draw questions spread over the test set, the last row those that are answered wrongly, if there are any."""
    test = read_questions(data)["test"]
    chosen = np.linspace(0, len(test.texts) - 1, TRIED).astype(int)
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for number in chosen.tolist():
            paths.append(Path(folder) / f"{number}.png")
            Image.fromarray(test.images.pixels(int(test.image_of[number]))).save(paths[-1])
        questions = tuple(test.texts[number] for number in chosen.tolist())
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            main(PredictConfig(run=run, task="vqa", image=tuple(paths), question=questions, batch_size=100))
    found = [json.loads(line) for line in said.getvalue().splitlines()]
    right = [one["answer"] == test.classes[test.labels[number]] for one, number in zip(found, chosen, strict=True)]
    wrong = [place for place in range(TRIED) if not right[place]][:COLUMNS]
    others = [place for place in range(0, TRIED, 29) if right[place]][: ROWS * COLUMNS - len(wrong)]
    figure = Figure(figsize=(2.6 * COLUMNS, 2.9 * ROWS), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, place in zip(figure.subplots(ROWS, COLUMNS).flat, [*others, *wrong], strict=False):
        number = int(chosen[place])
        axes.imshow(test.images.pixels(int(test.image_of[number])))
        axes.set_axis_off()
        own, true = found[place], test.classes[test.labels[number]]
        mark = "" if right[place] else f" (not {true})"
        axes.set_title(f"{own['question']}\n{own['answer']}{mark}, {own['probability']:.2f}", fontsize=8,
                       color="black" if right[place] else "firebrick")  # fmt: skip
    figure.savefig(out, dpi=90)
    print(f"{sum(right)} of {TRIED} right")


if __name__ == "__main__":
    draw(*map(Path, sys.argv[1:]))
