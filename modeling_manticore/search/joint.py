"""Single-level search: mixture weights and weights step together."""

from torch import nn

from .strategy import STRATEGIES, SearchStrategy


class JointStrategy(SearchStrategy):
    """
    Mixture weights and weights step together on the same batches (the paper's default), with one optimizer and two
    learning rates.
    """

    name = "joint"
    kinds = ("softmax", "gumbel_softmax")

    def check(self, hybrid: nn.Module) -> None:
        """
        Raises:
            ValueError: the mixture is a bare point of the simplex, which a plain gradient step would leave.
        """
        if hybrid.config.mixture == "simplex":
            raise ValueError(
                "strategy: got 'joint' for a hybrid with mixture='simplex', which needs exponentiated gradient (a "
                "plain step leaves the simplex); allowed with 'joint' are mixture='softmax' and 'gumbel_softmax'."
            )


STRATEGIES[JointStrategy.name] = JointStrategy
