"""`token_accuracy` for the evaluate library, usable without the Hub. Needs the extra `eval`."""

import datasets
import evaluate

from .metric import IGNORED, token_accuracy


class TokenAccuracy(evaluate.Metric):
    """
    Predictions and references are lists of token ids of one length. As in `token_accuracy`, the prediction at i - 1
    is compared with reference i, unless `shift=False`.
    """

    def _info(self) -> evaluate.MetricInfo:
        tokens = datasets.Sequence(datasets.Value("int64"))
        return evaluate.MetricInfo(
            description="Share of right tokens over the positions that have a label.",
            citation="",
            inputs_description=f"predictions, references: lists of token ids; {IGNORED} in a reference is no label.",
            features=datasets.Features({"predictions": tokens, "references": tokens}),
        )

    def _compute(self, predictions: list, references: list, shift: bool = True) -> dict[str, float | int]:
        """
        Raises:
            ValueError: as `token_accuracy`.
        """
        return token_accuracy(predictions, references, shift=shift)
