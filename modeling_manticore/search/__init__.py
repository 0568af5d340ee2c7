"""Training hybrids: stages, search strategies, and the Trainer that runs them."""

from .. import load
from .arguments import ManticoreTrainingArguments
from .darts import DartsStrategy
from .dash import DashStrategy
from .gaea import GaeaStrategy
from .joint import JointStrategy
from .mixture_kind import set_mixture_kind, suit_mixture
from .stages import STAGES
from .strategy import STRATEGIES, SearchStrategy, make_strategy
from .trainer import ManticoreTrainer


load()

__all__ = [
    "STAGES",
    "STRATEGIES",
    "DartsStrategy",
    "DashStrategy",
    "GaeaStrategy",
    "JointStrategy",
    "ManticoreTrainer",
    "ManticoreTrainingArguments",
    "SearchStrategy",
    "make_strategy",
    "set_mixture_kind",
    "suit_mixture",
]
