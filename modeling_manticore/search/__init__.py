"""Training hybrids: stages, search strategies, and the Trainer that runs them."""

from .arguments import ManticoreTrainingArguments
from .joint import JointStrategy
from .stages import STAGES
from .strategy import STRATEGIES, SearchStrategy, make_strategy
from .trainer import ManticoreTrainer


__all__ = [
    "STAGES",
    "STRATEGIES",
    "JointStrategy",
    "ManticoreTrainer",
    "ManticoreTrainingArguments",
    "SearchStrategy",
    "make_strategy",
]
