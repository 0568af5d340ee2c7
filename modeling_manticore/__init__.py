"""Hybrid language models made out of pretrained ones (Manticore, arXiv 2406.00894)."""

from importlib import import_module

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .building.calibrate import CalibrationReport, calibrate
from .building.compose import from_components
from .building.costs import Budget, cost_table, expected_cost
from .building.discretize import discretize
from .cache_manticore import ManticoreCache
from .configuration_manticore import ManticoreConfig
from .modeling_manticore import (
    ManticoreForCausalLM,
    ManticoreForSequenceClassification,
    ManticoreForTokenClassification,
    ManticoreModel,
    ManticorePreTrainedModel,
)


__version__ = "0.1.0"

# The workshop binds itself to the runtime class: a hybrid loaded from the Hub runs without it.
ManticoreForCausalLM.from_components = classmethod(from_components)

# Registered classes load without `trust_remote_code`; an auto class also takes its code along when saved.
AutoConfig.register(ManticoreConfig.model_type, ManticoreConfig, exist_ok=True)
ManticoreConfig.register_for_auto_class()
for _auto, _model in (
    (AutoModel, ManticoreModel),
    (AutoModelForCausalLM, ManticoreForCausalLM),
    (AutoModelForSequenceClassification, ManticoreForSequenceClassification),
    (AutoModelForTokenClassification, ManticoreForTokenClassification),
):
    _auto.register(ManticoreConfig, _model, exist_ok=True)
    _model.register_for_auto_class(_auto.__name__)

_LAZY = {
    "HalvingOptions": ".search.halving",
    "ManticoreSFTTrainer": ".search.sft",
    "ManticoreTrainer": ".search",
    "ManticoreTrainingArguments": ".search",
    "cache_teacher": ".search.teacher_cache",
    "ProgrammingReport": ".search.programming_report",
    "lora_config": ".search.adapters",
    "program": ".search.programming",
    "stitch": ".search.stitch",
    "sweep": ".search.sweep",
}


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


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
    "calibrate",
    "cost_table",
    "discretize",
    "expected_cost",
    "lora_config",
    "program",
    "stitch",
    "sweep",
]
