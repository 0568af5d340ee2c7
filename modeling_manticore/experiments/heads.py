"""What stands on a trunk where a task has no next token: a classifier of the last state."""

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel


class ClassificationModel(nn.Module):
    """Any model that gives hidden states, and a linear classifier of the state at every row's last token."""

    def __init__(self, trunk: PreTrainedModel, classes: int):
        """
        Args:
            trunk: from `AutoModel`: token ids to `last_hidden_state` (rows, length, hidden_size).
        """
        super().__init__()
        self.trunk = trunk
        self.classifier = nn.Linear(trunk.config.hidden_size, classes)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """`logits` (rows, classes); with labels (rows,) also `loss`, the mean cross-entropy in nats."""
        states = self.trunk(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        last = -1 if attention_mask is None else attention_mask.sum(dim=1) - 1
        logits = self.classifier(states[torch.arange(len(states), device=states.device), last])
        if labels is None:
            return {"logits": logits}
        return {"loss": functional.cross_entropy(logits.float(), labels), "logits": logits}


class LogitEnsemble(nn.Module):
    """Causal language models of one vocabulary that answer together: the mean of their probabilities."""

    def __init__(self, members: list[PreTrainedModel]):
        """
        Raises:
            ValueError: there are fewer than two, or their vocabularies differ in size.
        """
        sizes = {member.config.vocab_size for member in members}
        if len(members) < 2 or len(sizes) > 1:
            raise ValueError(
                f"sources: got {len(members)} with vocabularies of {sorted(sizes)}, allowed are two or more of one "
                "vocabulary."
            )
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """`logits` (rows, length, vocabulary), log-probabilities; with labels also `loss`, next-token nats."""
        parts = [
            member(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits.float().log_softmax(-1)
            for member in self.members
        ]
        logits = torch.stack(parts).logsumexp(dim=0) - torch.tensor(float(len(parts))).log()
        if labels is None:
            return {"logits": logits}
        loss = functional.nll_loss(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        return {"loss": loss, "logits": logits}
