"""The six synthetic tasks of MAD (mechanistic architecture design, arXiv 2403.17844)."""

from .metric import token_accuracy
from .settings import AXES, SETTINGS, MadSetting, difficulties, setting_of
from .splits import dataset_of, mad, make_splits


__all__ = [
    "AXES",
    "SETTINGS",
    "MadSetting",
    "dataset_of",
    "difficulties",
    "mad",
    "make_splits",
    "setting_of",
    "token_accuracy",
]
