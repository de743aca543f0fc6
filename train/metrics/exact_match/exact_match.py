"""Exact match per task, for the library `evaluate`: `evaluate.load("train/metrics/exact_match")`.

Kept here because the Hub's own metric modules need a network, and know no tasks.
"""

from collections import defaultdict
from typing import Any

import datasets
import evaluate

DESCRIPTION = """
Share of predictions that equal their reference, for each task and on average over the tasks.
White space at both ends doesn't count, and a run of it counts as one space.
"""

INPUTS = """
    predictions: list of str.
    references: list of str.
    tasks: list of str, the name of each example's task.
Returns:
    a dict of task name -> accuracy in 0..1, and "mean", the mean over tasks, each counted once.
"""


def normalize(text: str) -> str:
    return " ".join(text.split())


class ExactMatch(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        string = datasets.Value("string")
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features(predictions=string, references=string, tasks=string),
        )

    def _compute(
        self, predictions: list[str], references: list[str], tasks: list[str], **kwargs: Any
    ) -> dict[str, float]:
        hits = defaultdict(list)
        for prediction, reference, task in zip(predictions, references, tasks, strict=True):
            hits[task].append(normalize(prediction) == normalize(reference))
        scores = {task: sum(values) / len(values) for task, values in sorted(hits.items())}
        return {"mean": sum(scores.values()) / len(scores), **scores}
