"""
`bits_per_byte`, `perplexity` and `classification_accuracy` for the evaluate library, usable without the Hub. Needs the
extra `eval`. `TokenAccuracy` is in `tasks.mad.evaluate_metric`.
"""

import datasets
import evaluate

from . import metrics


def _info(description: str, inputs: str, predictions: str, references: str) -> evaluate.MetricInfo:
    kinds = {"predictions": datasets.Value(predictions), "references": datasets.Value(references)}
    return evaluate.MetricInfo(
        description=description, citation="", inputs_description=inputs, features=datasets.Features(kinds)
    )


class BitsPerByte(evaluate.Metric):
    """Predictions are the nats of every text, references the texts."""

    def _info(self) -> evaluate.MetricInfo:
        inputs = "predictions: negative log-likelihoods in nats; references: the texts."
        return _info("Bits a byte of UTF-8 text, whatever the tokenizer.", inputs, "float64", "string")

    def _compute(self, predictions: list[float], references: list[str]) -> dict[str, float]:
        """
        Raises:
            ValueError: as `metrics.bits_per_byte`.
        """
        sizes = [len(text.encode("utf-8")) for text in references]
        return {"bits_per_byte": metrics.bits_per_byte(predictions, sizes)}


class Perplexity(evaluate.Metric):
    """Predictions are the nats of every text, references its numbers of tokens."""

    def _info(self) -> evaluate.MetricInfo:
        inputs = "predictions: negative log-likelihoods in nats; references: numbers of predicted tokens."
        return _info("exp of the nats a token.", inputs, "float64", "int64")

    def _compute(self, predictions: list[float], references: list[int]) -> dict[str, float]:
        """
        Raises:
            ValueError: as `metrics.perplexity`.
        """
        return {"perplexity": metrics.perplexity(predictions, references)}


class ClassificationAccuracy(evaluate.Metric):
    """Predictions and references are classes."""

    def _info(self) -> evaluate.MetricInfo:
        inputs = "predictions, references: classes; train_labels: where the baseline's class is the most frequent one."
        return _info("Accuracy with its interval and the majority baseline.", inputs, "int64", "int64")

    def _compute(
        self, predictions: list[int], references: list[int], train_labels: list[int] | None = None
    ) -> dict[str, float | int | bool]:
        """
        Raises:
            ValueError: as `metrics.classification_accuracy`.
        """
        return metrics.classification_accuracy(predictions, references, train_labels)
