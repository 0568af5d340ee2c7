"""What autograd keeps between forward and backward, counted on tensors that have shapes and no content."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging

from .. import scan_manticore


logger = logging.get_logger(__name__)
LENGTH = 512  # tokens that are counted; a multiple of the families' chunks of time


@dataclass(frozen=True)
class Activations:
    """Bytes of one sequence: all that is kept; with layers checkpointed what is kept and the largest layer's own."""

    full: int
    checkpointed: int


def activation_bytes(model: PreTrainedModel, tokens: int) -> Activations | None:
    """
    Bytes that a training step of one sequence keeps for its backward pass, loss included, in the model's dtype.

    Attention is taken to keep no scores and the scan of Mamba-1 no states, as their kernels do; of Mamba-2 it is the
    families' own code, which keeps much more than its kernels. Temporary tensors are not counted. A sequence of 512
    tokens is counted, others are in proportion.

    Args:
        model: on the meta device; it is not changed.

    Returns:
        None, with a warning that says why, where torch does not run the family's code without contents: experts in
        float32, and code that chooses by content.
    """
    try:
        counted = _count(model)
    except RuntimeError as error:
        logger.warning(f"Activations are left out: {(str(error) or type(error).__name__).splitlines()[0]}")
        return None
    return Activations(*(round(part * tokens / LENGTH) for part in counted))


def _count(model: PreTrainedModel) -> tuple[int, int]:
    """Bytes kept by a sequence of `LENGTH` tokens: without and with checkpoints."""
    copied = copy.deepcopy(model).train()
    with FakeTensorMode(allow_non_fake_inputs=True), _scan_of_kernels():
        copied.to_empty(device="cpu")
        kept, inputs, own = _Kept(copied), [], []

        def enter(layer: nn.Module, given: tuple) -> None:
            inputs.extend(part.untyped_storage().nbytes() for part in given if isinstance(part, torch.Tensor))
            own.append(-kept.bytes)

        def leave(*_) -> None:
            own[-1] += kept.bytes

        for layer in copied.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                layer.register_forward_pre_hook(enter)
                layer.register_forward_hook(leave)
        ids = torch.zeros(1, LENGTH, dtype=torch.long)
        with torch.autograd.graph.saved_tensors_hooks(kept.save, lambda tensor: tensor):
            copied(input_ids=ids, labels=ids, use_cache=False)
    return kept.bytes, kept.bytes - sum(own) + sum(inputs) + max(own, default=0)


class _Kept:
    """Bytes of tensors that autograd saves, without parameters, each storage once."""

    def __init__(self, model: nn.Module):
        self.bytes = 0
        self.tensors = [*model.parameters(), *model.buffers()]  # kept, so that no storage takes another's place
        self.seen = {tensor.untyped_storage()._cdata for tensor in self.tensors}

    def save(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.seen:
            self.seen.add(storage._cdata)
            self.tensors.append(tensor)
            # A mask between all tokens is made only where contents cannot be looked at.
            if tensor.shape[-2:] != (LENGTH, LENGTH):
                self.bytes += storage.nbytes()
        return tensor


class _ScanOfKernels(torch.autograd.Function):
    """Keeps its inputs, and nothing of the states in between."""

    @staticmethod
    def forward(ctx, hidden_states: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(hidden_states, *others)
        return torch.empty_like(hidden_states)


@contextmanager
def _scan_of_kernels() -> Iterator[None]:
    """In place of the scans for CPUs, ones with the memory of mamba-ssm's kernels, and without a loop over tokens."""

    def scan(hidden_states, dt, A, B, C, D=None, z=None, delta_bias=None, return_last_state=False, **_):
        inputs = [part for part in (dt, A, B, C, D, z, delta_bias) if part is not None]
        y = _ScanOfKernels.apply(hidden_states, *inputs)
        return (y, A.new_zeros(len(dt), *A.shape)) if return_last_state else y

    def chunked(hidden_states, dt, A, B, C, D=None, dt_bias=None, **_):
        inputs = [part for part in (dt, A, B, C, D, dt_bias) if part is not None]
        return _ScanOfKernels.apply(hidden_states, *inputs)

    with mock.patch.multiple(scan_manticore, selective_scan=scan, chunk_scan=chunked):
        yield
