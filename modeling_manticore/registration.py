"""
What an import of the package does beyond giving names: the workshop is bound to the classes that run a hybrid, and
these are registered with transformers' Auto classes. A hybrid loaded from the Hub runs without any of it.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .building.compose import from_components
from .configuration_manticore import ManticoreConfig
from .hub.identity import stamped
from .hub.push import push_to_hub
from .modeling_manticore import (
    ManticoreForCausalLM,
    ManticoreForSequenceClassification,
    ManticoreForTokenClassification,
    ManticoreModel,
    ManticorePreTrainedModel,
)


ManticoreForCausalLM.from_components = classmethod(from_components)
ManticorePreTrainedModel.save_pretrained = stamped(ManticorePreTrainedModel.save_pretrained)
ManticorePreTrainedModel.push_to_hub = push_to_hub

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
