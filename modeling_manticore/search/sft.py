"""TRL's SFTTrainer for hybrids of any shape. Needs `trl`, which nothing else here does."""

from torch import nn
from transformers import PreTrainedModel, Trainer
from trl import SFTTrainer

from .publishing import PushingMixin
from .stages import unwrap


class ManticoreSFTTrainer(PushingMixin, SFTTrainer):
    """
    `trl.SFTTrainer` with the loss that the hybrid itself computes. TRL replaces the model's `forward` by one that
    takes the logits for the last hidden state times one matrix; of a supernet, and wherever the head has a projector,
    a norm or a scale, they are more, and the hybrid refuses the replacement. The price is the memory of full logits.

    Raises:
        ValueError: `model` is not a hybrid in memory, or `loss_type` is not "nll".
    """

    def __init__(self, model: nn.Module, args=None, **kwargs):
        if not isinstance(model, nn.Module):
            raise ValueError(f"model: got {model!r}, allowed is a hybrid in memory (load it with from_pretrained).")
        if args is not None and args.loss_type != "nll":
            raise ValueError(f"loss_type: got {args.loss_type!r}, allowed is 'nll', the hybrid's own loss.")
        hybrid: PreTrainedModel = unwrap(model)
        hybrid.keep_forward = True
        try:
            super().__init__(model, args, **kwargs)
        finally:
            del hybrid.keep_forward

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """As in transformers; logged with it: how many labels are the likeliest token, and the tokens seen."""
        inputs = dict(inputs, use_cache=False)
        labels = inputs["labels"][:, 1:]
        loss, outputs = Trainer.compute_loss(self, model, inputs, True, num_items_in_batch)
        real = labels != -100
        right = ((outputs.logits[:, :-1].argmax(-1) == labels) & real).sum()
        counts = self.accelerator.gather_for_metrics((right, real.sum(), inputs["attention_mask"].sum()))
        right, total, tokens = (count.sum().item() for count in counts)
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["mean_token_accuracy"].append(right / max(total, 1))
        if mode == "train":
            self._total_train_tokens += tokens
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
        return (loss, outputs) if return_outputs else loss
