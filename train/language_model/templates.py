"""How each task is put to a language model: the prompts, in one place, and the words of the answers.

A prompt is filled with an example's texts; the answer follows it, and in examples that are shown ("shots") is followed
by a blank line. Prompts end without a space and answers begin with one, as byte-level BPE wants it. Most are those of
Brown et al. 2020, appendix G.
"""

from collections.abc import Mapping
from typing import NamedTuple


class Template(NamedTuple):
    """The prompt of a task."""

    prompt: str  # with {first} and {second} for the texts of an example
    answers: tuple[str, ...] | None = None  # by class number; None: they are part of the examples

    @property
    def context(self) -> str:
        """The prompt's last line, which is what answers follow without an example, for calibration."""
        line = self.prompt.rpartition("\n")[2]
        return "" if "{" in line else line

    def fill(self, first: str, second: str | None) -> str:
        """Return the prompt of an example."""
        return self.prompt.replace("{second}", second or "").replace("{first}", first)


RATINGS = tuple(f" {rating}" for rating in range(6))
TEMPLATES: Mapping[str, Template] = {
    "cola": Template("Sentence: {first}\nquestion: Is this sentence grammatical?\nanswer:", (" no", " yes")),
    "sst2": Template("Review: {first}\nSentiment:", (" negative", " positive")),
    "mrpc": Template(
        "Sentence 1: {first}\nSentence 2: {second}\nquestion: Do both sentences mean the same?\nanswer:",
        (" no", " yes"),
    ),
    "stsb": Template(
        "Sentence 1: {first}\nSentence 2: {second}\nquestion: How similar are they, from 0 to 5?\nanswer:", RATINGS
    ),
    "qqp": Template(
        "Question 1: {first}\nQuestion 2: {second}\nquestion: Do both questions ask the same?\nanswer:", (" no", " yes")
    ),
    "mnli": Template("{first}\nquestion: {second} true, false, or neither?\nanswer:", (" true", " neither", " false")),
    "qnli": Template(
        "Question: {first}\nSentence: {second}\nquestion: Does the sentence answer the question?\nanswer:",
        (" yes", " no"),
    ),
    "rte": Template("{first}\nquestion: {second} True or False?\nanswer:", (" True", " False")),
    "wnli": Template("{first}\nquestion: {second} True or False?\nanswer:", (" False", " True")),
    "swag": Template("{first}"),
    "codah": Template("{first}"),
    "squad": Template("{first}\n\nQ: {second}\n\nA:"),
    "translation": Template("{first} ="),
    "classification": Template("Text: {first}\nLabel:"),
    "pairs": Template("Text 1: {first}\nText 2: {second}\nLabel:"),
}
"""Name of a task -> its template; `classification` and `pairs` are for any table, whose answers are its labels."""

UNANSWERABLE = " unanswerable"
"""Answer to a question of SQuAD 2.0 that has none."""
