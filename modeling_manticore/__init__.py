"""Hybrid language models made out of pretrained ones (Manticore, arXiv 2406.00894)."""

import sys
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .building.calibrate import CalibrationReport, calibrate
    from .building.costs import Budget, cost_table, expected_cost
    from .building.discretize import discretize
    from .building.transplant import TransplantReport
    from .cache_manticore import ManticoreCache
    from .configuration_manticore import ManticoreConfig
    from .hub.identity import verify
    from .hub.push import push_folder, push_hybrid
    from .modeling_manticore import (
        ManticoreForCausalLM,
        ManticoreForSequenceClassification,
        ManticoreForTokenClassification,
        ManticoreModel,
        ManticorePreTrainedModel,
    )
    from .search import ManticoreTrainer, ManticoreTrainingArguments
    from .search.adapters import lora_config
    from .search.halving import HalvingOptions
    from .search.programming import program
    from .search.programming_report import ProgrammingReport
    from .search.sft import ManticoreSFTTrainer
    from .search.stitch import stitch
    from .search.sweep import sweep
    from .search.teacher_cache import cache_teacher


__version__ = "0.1.0"

_HOMES = {
    "Budget": ".building.costs",
    "CalibrationReport": ".building.calibrate",
    "HalvingOptions": ".search.halving",
    "ManticoreCache": ".cache_manticore",
    "ManticoreConfig": ".configuration_manticore",
    "ManticoreForCausalLM": ".modeling_manticore",
    "ManticoreForSequenceClassification": ".modeling_manticore",
    "ManticoreForTokenClassification": ".modeling_manticore",
    "ManticoreModel": ".modeling_manticore",
    "ManticorePreTrainedModel": ".modeling_manticore",
    "ManticoreSFTTrainer": ".search.sft",
    "ManticoreTrainer": ".search",
    "ManticoreTrainingArguments": ".search",
    "ProgrammingReport": ".search.programming_report",
    "TransplantReport": ".building.transplant",
    "cache_teacher": ".search.teacher_cache",
    "calibrate": ".building.calibrate",
    "cost_table": ".building.costs",
    "discretize": ".building.discretize",
    "expected_cost": ".building.costs",
    "lora_config": ".search.adapters",
    "program": ".search.programming",
    "push_folder": ".hub.push",
    "push_hybrid": ".hub.push",
    "stitch": ".search.stitch",
    "sweep": ".search.sweep",
    "verify": ".hub.identity",
}

before_loading: list[Callable[[], None]] = []  # called once each, before torch and transformers are loaded
when_loaded: list[Callable[[], None]] = []  # called once each, as soon as they are there


def load() -> None:
    """
    Bind and register (`registration.py`). An import of this package does it at once; a command, which may only have
    to say its help, when the first part is imported that runs or makes a hybrid.
    """
    while before_loading:
        before_loading.pop()()
    import_module(".registration", __name__)
    while when_loaded:
        when_loaded.pop()()


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    load()
    return getattr(import_module(_HOMES[name], __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


__all__ = [
    "Budget",
    "CalibrationReport",
    "HalvingOptions",
    "ManticoreCache",
    "ManticoreConfig",
    "ManticoreForCausalLM",
    "ManticoreForSequenceClassification",
    "ManticoreForTokenClassification",
    "ManticoreModel",
    "ManticorePreTrainedModel",
    "ManticoreSFTTrainer",
    "ManticoreTrainer",
    "ManticoreTrainingArguments",
    "cache_teacher",
    "ProgrammingReport",
    "TransplantReport",
    "calibrate",
    "cost_table",
    "discretize",
    "expected_cost",
    "lora_config",
    "program",
    "push_folder",
    "push_hybrid",
    "stitch",
    "sweep",
    "verify",
]

if "manticore_command" not in sys.modules:
    load()
