"""What strategies share that step mixture weights themselves: whose they are, their gradient, their learning rate."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .search_report import tokens_in
from .stages import mixture_modules, trainable_ids


if TYPE_CHECKING:
    from .arguments import ManticoreTrainingArguments
    from .trainer import ManticoreTrainer


def check_kind(strategy: str, hybrid: nn.Module, allowed: tuple[str, ...]) -> None:
    """
    Raises:
        ValueError: the parametrisation of the hybrid's mixture weights is none that the strategy can step.
    """
    if hybrid.config.mixture not in allowed:
        kinds = " and ".join(f"mixture={kind!r}" for kind in allowed)
        raise ValueError(
            f"strategy: got {strategy!r} for a hybrid with mixture={hybrid.config.mixture!r}; allowed with "
            f"{strategy!r} {'is' if len(allowed) == 1 else 'are'} {kinds}: "
            f"modeling_manticore.search.set_mixture_kind(model, {allowed[0]!r}) changes it and keeps the weights."
        )


def check_own_steps(args: "ManticoreTrainingArguments", hybrid: nn.Module) -> None:
    """
    What a strategy needs that steps mixture weights outside the Trainer's optimizer.

    Raises:
        ValueError: float16 (its loss scale is the optimizer's), several devices in one process, reentrant
            checkpointing, or no weight but the mixture's trains.
    """
    name = args.strategy
    if args.fp16:
        raise ValueError(f"fp16: got True with strategy={name!r}, allowed are bf16=True and float32.")
    if args.n_gpu > 1:
        raise ValueError(
            f"strategy: got {name!r} with {args.n_gpu} devices in one process, allowed is torchrun (DDP)."
        )
    if args.gradient_checkpointing and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
        raise ValueError(
            f"gradient_checkpointing_kwargs: got use_reentrant=True with strategy={name!r}, allowed is False: "
            "reentrant checkpoints give no gradient to mixture weights alone."
        )
    mixtures = {id(module.parameter) for module in mixture_modules(hybrid)}
    wanted = trainable_ids(hybrid, "search", args.train_components) - mixtures
    if not any(p.requires_grad and id(p) in wanted for p in hybrid.parameters()):
        raise ValueError(
            f"strategy: got {name!r} for a hybrid of which nothing but the mixture weights trains; allowed is "
            "'joint', which steps them alone."
        )


def gates_among(mixtures: list[nn.Parameter]) -> list[nn.Parameter]:
    """The learned gates, one number each, among mixture parameters; a point has two paths or more."""
    return [parameter for parameter in mixtures if parameter.numel() == 1]


def mixture_points(trainer: "ManticoreTrainer") -> list[nn.Parameter]:
    """
    The mixture parameters that are not frozen, in the order of the blocks, each (paths,), float32.

    Raises:
        ValueError: FSDP or DeepSpeed, which would leave no process the whole hybrid for a mixture step.
    """
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise ValueError(
            f"strategy: got {trainer.args.strategy!r} under {'FSDP' if trainer.is_fsdp_enabled else 'DeepSpeed'}, "
            "allowed with it are one process and DDP; 'joint' and 'dash' run under all of them."
        )
    modules = mixture_modules(trainer.hybrid)
    return [module.parameter for module in modules if module.parameter.requires_grad]


@contextmanager
def taken_out(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Parameters that the weight step neither differentiates, clips nor steps."""
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


@contextmanager
def put_in(parameters: list[nn.Parameter]) -> Iterator[None]:
    """The parameters of `taken_out`, differentiable for once."""
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)


def search_gradients(
    trainer: "ManticoreTrainer", parameters: list[nn.Parameter], batches: list[dict[str, Any]]
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """
    Gradients of the Trainer's own loss over micro-batches with respect to `parameters` only, and the loss.

    The loss is normalised over all micro-batches and processes together, as that of a weight step is, and the gradient
    clipped to `max_grad_norm` (over `parameters` alone). Backward computes no gradient of weights and leaves every
    `.grad` as it was, so a wrapper such as DDP does not see it; the gradients are averaged over processes here.

    Args:
        parameters: those of `taken_out`, each (paths,), float32.
        batches: micro-batches of one step of this process.

    Returns:
        one gradient per parameter, (paths,), float32, and the loss in nats, a scalar.
    """
    args, model = trainer.args, trainer.model
    model.train()
    if callable(getattr(trainer.optimizer, "train", None)):
        trainer.optimizer.train()
    trainer.effort.search_tokens += sum(map(tokens_in, batches)) * args.world_size
    batches = [trainer._prepare_inputs(batch) for batch in batches]
    items = trainer._get_num_items_in_batch(batches, args.device)
    scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
    if scaled is None:
        scaled = (trainer.model_accepts_loss_kwargs and items is not None) or trainer.compute_loss_func is not None
    totals = [torch.zeros_like(parameter) for parameter in parameters]
    whole = torch.zeros((), device=args.device)
    parts, trainer.current_gradient_accumulation_steps = trainer.current_gradient_accumulation_steps, len(batches)
    with put_in(parameters):
        for batch in batches:
            with trainer.compute_loss_context_manager():
                loss = trainer.compute_loss(model, batch, num_items_in_batch=items)
            loss = loss if scaled else loss / len(batches)
            found = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
            for total, gradient in zip(totals, found):
                total += gradient
            whole += loss.detach()
    trainer.current_gradient_accumulation_steps = parts
    totals = [trainer.accelerator.reduce(total, reduction="mean") for total in totals]
    if args.max_grad_norm > 0:
        nn.utils.clip_grads_with_norm_(
            _holding(totals), args.max_grad_norm, nn.utils.get_total_norm(totals), foreach=False
        )
    return totals, trainer.accelerator.reduce(whole, reduction="mean")


def _holding(gradients: list[torch.Tensor]) -> list[nn.Parameter]:
    """Parameters with these gradients, for functions that change gradients of parameters in place."""
    holders = [nn.Parameter(torch.empty_like(gradient)) for gradient in gradients]
    for holder, gradient in zip(holders, gradients):
        holder.grad = gradient
    return holders


def mixture_rate(trainer: "ManticoreTrainer") -> float:
    """
    The learning rate of mixture weights at this step: `mixture_learning_rate`, scheduled like that of the weights
    (constant where theirs is 0).
    """
    for group in trainer.optimizer.param_groups:
        peak = group.get("initial_lr", trainer.args.learning_rate)
        if peak > 0:
            return trainer.args.mixture_learning_rate * float(group["lr"]) / peak
    return trainer.args.mixture_learning_rate
