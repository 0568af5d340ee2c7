"""Training arguments: those of transformers, plus the stage, the search strategy and the mixture's learning rate."""

import math
from dataclasses import dataclass, field

from transformers import TrainingArguments

from .stages import STAGES
from .strategy import STRATEGIES


@dataclass
class ManticoreTrainingArguments(TrainingArguments):
    """
    `transformers.TrainingArguments` with the arguments of a hybrid.

    Raises:
        ValueError: names the argument, what was given and what is allowed.
    """

    stage: str = field(
        default="finetune",
        metadata={
            "help": "What trains: 'projectors' (projectors only), 'search' (mixture weights, projectors and, unless "
            "train_components is off, components) or 'finetune' (everything but mixture weights)."
        },
    )
    strategy: str = field(
        default="joint", metadata={"help": "How stage 'search' finds mixture weights; see modeling_manticore.search."}
    )
    mixture_learning_rate: float = field(
        default=1e-2,
        metadata={"help": "Learning rate of mixture weights and learned gates, scheduled like the other."},
    )
    train_components: bool = field(
        default=True, metadata={"help": "Whether stage 'search' also trains the components' own weights."}
    )

    def __post_init__(self):
        if self.stage not in STAGES:
            raise ValueError(f"stage: got {self.stage!r}, allowed are {', '.join(map(repr, STAGES))}.")
        if self.strategy not in STRATEGIES:
            raise ValueError(f"strategy: got {self.strategy!r}, allowed are {', '.join(map(repr, STRATEGIES))}.")
        rate = self.mixture_learning_rate
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not math.isfinite(rate) or rate < 0:
            raise ValueError(f"mixture_learning_rate: got {rate!r}, allowed is a finite number >= 0.")
        super().__post_init__()
