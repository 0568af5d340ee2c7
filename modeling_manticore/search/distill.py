"""
Distillation: a hybrid learns what a teacher says.

    loss = (1 - w) * loss on labels + w * T^2 * KL(teacher_T || student_T) + m * hidden-state matching

with w = `distill_weight`, T = `distill_temperature` (both distributions are softmax(logits / T); T^2 keeps the size of
gradients) and m = `hidden_weight`. All three are sums over the places that count (one before a label that is not -100;
of the teacher's two, those that are no padding) over the same number, that of the Trainer's own loss: all labels of an
optimizer step, of all processes. While evaluating, the loss is that on labels.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .teachers import Lesson, Prompt, component_taught, make_teacher


if TYPE_CHECKING:
    from .arguments import ManticoreTrainingArguments
    from .trainer import ManticoreTrainer


def divergence(logits: torch.Tensor, lesson: Lesson, temperature: float = 1.0) -> torch.Tensor:
    """
    KL(teacher || student) in nats at a temperature, (n,) in float32, of the student's logits (n, vocabulary).

    Of a teacher's k likeliest tokens with the rest of the mass, all other tokens are one further token, for the
    student too: never more than the full divergence, and equal to it where k is the vocabulary.
    """
    log_q = torch.log_softmax(logits.float() / temperature, dim=-1)
    if lesson.logits is not None:
        return _weighted_difference(torch.log_softmax(lesson.logits.float() / temperature, dim=-1), log_q)
    log_p = lesson.log_probabilities
    kept = log_p.exp().sum(-1, keepdim=True)
    log_p = log_p + ((1 - lesson.rest.unsqueeze(-1)) / kept).log()  # rounding on disk must not change the mass
    found = _weighted_difference(log_p, log_q.gather(-1, lesson.indices))
    if lesson.indices.shape[-1] == logits.shape[-1]:
        return found
    others = log_q.scatter(-1, lesson.indices, -torch.inf).logsumexp(-1)
    return found + torch.xlogy(lesson.rest, lesson.rest) - lesson.rest * others


def _weighted_difference(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """sum p (log p - log q) over the last axis; tokens that the teacher excludes (-inf) count nothing."""
    p = log_p.exp()
    return (p * (log_p - log_q).masked_fill(p == 0, 0.0)).sum(-1)


def relative_error(states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """|u - v|^2 / |v - mean(v)|^2 over the last axis, (n, d) -> (n,), in float32: 0 is equal, 1 as far as the mean."""
    targets = targets.float()
    spread = targets.var(-1, correction=0).clamp_min(torch.finfo(torch.float32).eps)
    return (states.float() - targets).square().mean(-1) / spread


class CutMatching:
    """
    The places where states of a discretized hybrid should be those of one uncut component, its teacher:

        after a block   that ends with layer `stop` of the component, before the next block's bridge
        before a block  that begins with its layer `start`, behind the bridge

    so a block of another component is judged by what the component's next block receives through the bridge.

    Raises:
        ValueError: a supernet, or a hybrid without such a place.
    """

    def __init__(self, hybrid: PreTrainedModel, component: int):
        config = hybrid.config
        if not config.is_discretized:
            raise ValueError(
                "hidden_weight: got a supernet, allowed is a discretized hybrid; for a supernet give hidden_weight=0."
            )
        self.blocks = hybrid.trunk.blocks
        self.points: list[tuple[int, bool, int]] = []  # block, whether behind it, layer of the component
        for b, ((path,), block) in enumerate(zip(config.blocks, self.blocks)):
            if path["component"] != component:
                continue
            if block.paths[0].in_projector is not None:
                self.points.append((b, False, path["start"]))
            if b < len(self.blocks) - 1 and path["stop"] < config.depth(component):
                self.points.append((b, True, path["stop"]))
        if not self.points:
            raise ValueError(
                f"hidden_weight: no block begins behind a bridge or ends before another with a layer of component "
                f"{component}, the teacher; allowed with it is 0."
            )

    @property
    def layers(self) -> set[int]:
        """Layers of the teacher whose inputs are needed."""
        return {layer for _, _, layer in self.points}

    @contextmanager
    def watching(self) -> Iterator[dict]:
        """Collects the student's states, (batch, tokens, d), of the forward passes inside."""
        states: dict[tuple[int, bool, int], torch.Tensor] = {}
        handles = []
        for point in self.points:
            b, behind, _ = point
            if behind:
                handles.append(self.blocks[b].register_forward_hook(_keep_state(states, point)))
            else:
                view = self.blocks[b].paths[0].slice
                handles.append(view.register_forward_pre_hook(_keep_embeds(states, point), with_kwargs=True))
        try:
            yield states
        finally:
            for handle in handles:
                handle.remove()

    def error(self, states: dict, prompt: Prompt, lesson: Lesson) -> torch.Tensor:
        """The mean relative error of all places, summed over the tokens that count, a scalar."""
        place = prompt.counted.device
        errors = [
            relative_error(states[point].to(place)[prompt.counted], lesson.states[point[2]]).sum()
            for point in self.points
        ]
        return torch.stack(errors).mean()


class Distiller:
    """
    The term that a teacher adds to the Trainer's loss.

    Args:
        given: what the user named as teacher; see `make_teacher`.

    Raises:
        ValueError: the teacher is none, has another vocabulary, or cannot teach what the arguments ask for.
    """

    def __init__(self, args: "ManticoreTrainingArguments", given: Any, hybrid: PreTrainedModel):
        if not hasattr(hybrid, "heads"):
            raise ValueError(f"model: got {type(hybrid).__name__} with a teacher, allowed is ManticoreForCausalLM.")
        self.weight, self.temperature = args.distill_weight, float(args.distill_temperature)
        self.hidden_weight, self.matching = args.hidden_weight, None
        self.teacher = make_teacher(given, hybrid)
        if hasattr(self.teacher, "check_temperature"):
            self.teacher.check_temperature(self.temperature)
        if self.hidden_weight:
            if args.n_gpu > 1:
                raise ValueError(
                    f"hidden_weight: got {self.hidden_weight} with {args.n_gpu} devices in one process, allowed is "
                    "torchrun (DDP)."
                )
            self.matching = CutMatching(hybrid, component_taught(given, self.teacher, hybrid))
        self._seen: torch.Tensor | None = None

    def loss(
        self, trainer: "ManticoreTrainer", own_loss: Callable, model: nn.Module, inputs: dict, num_items: Any
    ) -> tuple[torch.Tensor, Any]:
        """
        Args:
            own_loss: `Trainer.compute_loss`, which runs the student.
            num_items: labels of the whole optimizer step, or None: then the mean over this batch.

        Returns:
            The loss, scaled as the Trainer scales its own, and the student's outputs.
        """
        prompt = Prompt.of(inputs)
        given = {key: inputs[key] for key in ("labels", "shift_labels") if inputs.get(key) is not None}
        if self.matching is None:
            states = {}
            loss, outputs = own_loss(model, inputs, True, num_items)
        else:
            with self.matching.watching() as states:
                loss, outputs = own_loss(model, inputs, True, num_items)
        lesson = self.teacher.lesson(prompt, () if self.matching is None else self.matching.layers)
        scale = loss_scale(trainer, num_items) / _normaliser(trainer, num_items, prompt.labels)
        kl = divergence(outputs.logits[prompt.counted], lesson, self.temperature).sum()
        hidden = kl.new_zeros(()) if self.matching is None else self.matching.error(states, prompt, lesson)
        self._remember(torch.stack([kl.detach(), hidden.detach(), prompt.counted.sum().to(kl)]))
        labels = _label_part(trainer, loss, outputs, given, num_items)
        taught = self.weight * self.temperature**2 * kl + self.hidden_weight * hidden
        return loss - self.weight * labels + scale * taught, outputs

    def _remember(self, sums: torch.Tensor) -> None:
        self._seen = sums if self._seen is None else self._seen + sums

    def logs(self, trainer: "ManticoreTrainer") -> dict[str, float]:
        """The mean divergence (nats, at the temperature, not times T^2) and relative error since the last call."""
        if self._seen is None:
            return {}
        kl, hidden, total = trainer.accelerator.reduce(self._seen, reduction="sum").tolist()
        self._seen = None
        found = {"distill/kl": kl / max(total, 1)}
        return found if self.matching is None else found | {"distill/hidden": hidden / max(total, 1)}


def check_distillation(args: "ManticoreTrainingArguments", teacher: Any) -> None:
    """
    Raises:
        ValueError: no teacher where the arguments ask for one, or one that they do not use.
    """
    wanted = bool(args.distill_weight or args.hidden_weight)
    if wanted and teacher is None:
        raise ValueError(
            f"teacher: got None with stage={args.stage!r}, distill_weight={args.distill_weight} and "
            f"hidden_weight={args.hidden_weight}; allowed is a teacher."
        )
    if teacher is not None and not wanted:
        raise ValueError(
            f"teacher: got one with stage={args.stage!r} and distill_weight=0, which would not use it; allowed are "
            "stage='distill', distill_weight or hidden_weight above 0, or no teacher."
        )


def loss_scale(trainer: "ManticoreTrainer", num_items: Any) -> float:
    """What transformers multiplies its loss by, because DDP takes the mean of gradients whose sum is wanted."""
    if not trainer.args.average_tokens_across_devices or not _per_item(trainer, num_items) or trainer.args.n_gpu > 1:
        return 1
    return trainer.accelerator.num_processes // trainer.get_tp_size()


def _per_item(trainer: "ManticoreTrainer", num_items: Any) -> bool:
    return num_items is not None and bool(trainer.model_accepts_loss_kwargs or trainer.compute_loss_func)


def _normaliser(trainer: "ManticoreTrainer", num_items: Any, labels: torch.Tensor) -> torch.Tensor:
    if not _per_item(trainer, num_items):
        return labels.clamp_min(1)
    return num_items.flatten()[0].to(labels.device) if isinstance(num_items, torch.Tensor) else num_items


def _label_part(trainer, loss: torch.Tensor, outputs: Any, given: dict, num_items: Any) -> torch.Tensor:
    """The part of the Trainer's loss that comes from labels: all of it, unless a part balances experts."""
    if getattr(outputs, "aux_loss", None) is None or getattr(outputs, "loss", None) is None:
        return loss
    options = {"num_items_in_batch": num_items} if _per_item(trainer, num_items) else {}
    options |= {"labels": None} | given
    hybrid = trainer.hybrid
    part = hybrid.loss_function(logits=outputs.logits, vocab_size=hybrid.config.vocab_size, **options)
    return loss_scale(trainer, num_items) * part


def _keep_state(states: dict, point: tuple) -> Callable:
    def hook(module, args, output):
        states[point] = output.states[0]

    return hook


def _keep_embeds(states: dict, point: tuple) -> Callable:
    def hook(module, args, kwargs):
        states[point] = kwargs["inputs_embeds"]

    return hook
