"""Training hybrids: stages, search strategies, and the Trainer that runs them."""

from .arguments import ManticoreTrainingArguments
from .strategy import STRATEGIES, SearchStrategy, make_strategy
from .trainer import ManticoreTrainer


__all__ = ["STRATEGIES", "ManticoreTrainer", "ManticoreTrainingArguments", "SearchStrategy", "make_strategy"]
