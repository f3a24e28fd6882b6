"""Write a table of easy-VQA's training images with the colour and form of the thing shown, of which the questions tell.

    python bench/easy_vqa.py easy_vqa DIR

DIR gets the training images and both.csv, for `bestiary images train --data DIR/both.csv`: of the images for which one
question's answer is the colour, and another's the form.
"""

import argparse
import csv
import json
import zipfile
from collections import defaultdict
from pathlib import Path

FORMS = {"circle", "rectangle", "triangle"}
COLOURS = {"black", "blue", "brown", "gray", "green", "red", "teal", "yellow"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    a = parser.parse_args()
    told: defaultdict[int, set[str]] = defaultdict(set)
    for _, answer, image in json.loads((a.data / "train_questions.json").read_text()):
        told[image] |= {answer} & (FORMS | COLOURS)
    with zipfile.ZipFile(a.data / "images.zip") as archive:
        archive.extractall(a.out, [name for name in archive.namelist() if name.startswith("train/")])
    with open(a.out / "both.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("image", "label"))
        for image, words in sorted(told.items()):
            if len(words) == 2:
                table.writerow((f"train/images/{image}.png", " ".join(sorted(words, key=FORMS.__contains__))))


if __name__ == "__main__":
    main()
