"""`label_accuracy` for the evaluate library, usable without the Hub. Needs the extra `eval`."""

import datasets
import evaluate

from .label_accuracy import label_accuracy


class LabelAccuracy(evaluate.Metric):
    """Predictions and references are labels, one a row."""

    def _info(self) -> evaluate.MetricInfo:
        label = datasets.Value("int64")
        return evaluate.MetricInfo(
            description="Share of right labels, and that of the most frequent label alone.",
            citation="",
            inputs_description="predictions, references: labels.",
            features=datasets.Features({"predictions": label, "references": label}),
        )

    def _compute(self, predictions: list, references: list) -> dict[str, float | int]:
        """
        Raises:
            ValueError: as `label_accuracy`.
        """
        return label_accuracy(predictions, references)
