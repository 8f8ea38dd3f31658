"""Small networks of PyTorch, and what a real step of one keeps, by PyTorch's hooks and nothing of ours."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


def really_kept(module: Any, inputs: tuple[Any, ...], loss: Callable[[Any], Any], autocast: Any = None) -> int:
    """Bytes that a real step keeps: every storage once, parameters and buffers left out."""
    own = copy.deepcopy(module)
    seen: dict[int, Any] = {}

    def keep(tensor: Any) -> Any:
        if tensor is not None:
            seen[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    context = nullcontext() if autocast is None else torch.autocast("cpu", dtype=autocast)
    with context, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        value = loss(own(*inputs))
    value.backward()
    own_storages = {t.untyped_storage()._cdata for t in (*own.parameters(), *own.buffers())}
    return sum(storage.nbytes() for key, storage in seen.items() if key not in own_storages)


def summed(output: Any) -> Any:
    """The sum of all outputs."""
    outputs = _flat(output)
    return sum((each.sum() for each in outputs[1:]), outputs[0].sum())


def _flat(output: Any) -> list[Any]:
    if isinstance(output, torch.Tensor):
        return [output]
    return [tensor for each in output for tensor in _flat(each)]


def between(*layers: Any) -> Any:
    """Layers on 4 channels between two convolutions."""
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), *layers, nn.Conv2d(4, 4, 1))


class Attention(nn.Module):
    """Scaled dot-product attention on one projection."""

    def __init__(self, dropout: float = 0.0, causal: bool = False) -> None:
        super().__init__()
        self.project = nn.Linear(16, 48)
        self.dropout, self.causal = dropout, causal

    def forward(self, x: Any) -> Any:
        B, L, _ = x.shape
        q, k, v = self.project(x).view(B, L, 3, 2, 8).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout, is_causal=self.causal)


class Checkpointed(nn.Module):
    """Two linear layers that run twice, and a head."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        self.head = nn.Linear(8, 5)
        self.reentrant = reentrant

    def forward(self, x: Any) -> Any:
        x = x + self.head.bias.sum()  # so that the segment's input has a gradient
        return self.head(checkpoint(self.body, x, use_reentrant=self.reentrant))


class Tied(nn.Module):
    """A table that is also the last layer's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: Any) -> Any:
        return self.head(self.table(tokens))


class Named(nn.Module):
    """Two inputs, one of them by name; a dictionary as output."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, tokens: Any, *, mask: Any, labels: Any = None) -> dict[str, Any]:
        logits = self.head((self.table(tokens) * mask[..., None]).mean(1))
        found = {"logits": logits, "other": logits + 1}
        return found if labels is None else {**found, "loss": F.cross_entropy(logits, labels)}


class ByValue(nn.Module):
    """Goes one way or the other, by what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Any) -> Any:
        return self.layer(x) if x.sum() > 0 else 2 * self.layer(x)


def plain() -> Any:
    """A factory: a convolution with groups, batch norm, and a classifier."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4), nn.BatchNorm2d(8), nn.SiLU(), nn.Flatten(),
        nn.Linear(8 * 12 * 12, 10),
    )  # fmt: skip


def all_frozen() -> Any:
    """A factory of a net in which nothing trains."""
    return plain().requires_grad_(False)


def raising() -> Any:
    """A factory that fails."""
    raise KeyError("no weights")


def squares(output: Any) -> Any:
    """A loss."""
    return (output**2).mean()


def many_numbers(output: Any) -> Any:
    """No loss."""
    return output


MAPS, TOKENS = (3, 9, 9), (5, 16)
NETS: dict[str, tuple[Any, Any]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 4)), (7,)),
    "groups": (plain, (3, 16, 16)),
    "silu": (lambda: between(nn.SiLU()), MAPS),
    "in place": (lambda: between(nn.BatchNorm2d(4), nn.Hardswish(inplace=True), nn.ReLU(inplace=True)), MAPS),
    "ceil mode": (lambda: between(nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True)), MAPS),
    "padding same": (lambda: nn.Conv2d(3, 4, 4, padding="same"), MAPS),
    "reflected": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), MAPS),
    "frozen statistics": (lambda: between(nn.BatchNorm2d(4)).eval(), MAPS),
    "averaged statistics": (lambda: between(nn.BatchNorm2d(4, momentum=None)), MAPS),
    "group norm": (lambda: between(nn.GroupNorm(2, 4)), MAPS),
    "layer norm": (lambda: between(nn.LayerNorm([9, 9])), MAPS),
    "rms norm": (lambda: between(nn.RMSNorm(9)), MAPS),
    "instance norm": (lambda: between(nn.InstanceNorm2d(4, affine=True)), MAPS),
    "dropout": (lambda: between(nn.Dropout(0.3)), MAPS),
    "gelu": (lambda: between(nn.GELU(), nn.AdaptiveAvgPool2d(3), nn.Upsample(scale_factor=2, mode="bilinear")), MAPS),
    "1-d": (lambda: nn.Sequential(nn.Conv1d(3, 6, 3, groups=3), nn.ConvTranspose1d(6, 4, 3, 2, groups=2)), (3, 19)),
    "3-d": (lambda: nn.Sequential(nn.Conv3d(2, 4, (2, 3, 3), (1, 2, 1), groups=2), nn.MaxPool3d(2)), (2, 5, 9, 9)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 4, stride=2, padding=1, bias=False), (4, 8, 8)),
    "on maps": (lambda: nn.Linear(9, 5), MAPS),
    "attention": (Attention, TOKENS),
    "causal": (lambda: Attention(causal=True), TOKENS),
    "attention with dropout": (lambda: Attention(dropout=0.1), TOKENS),
    "encoder": (lambda: nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), TOKENS),
    "lstm": (lambda: nn.LSTM(16, 6, 2, bidirectional=True, batch_first=True), TOKENS),
    "gru": (lambda: nn.GRU(16, 6, batch_first=True), TOKENS),
    "checkpoint": (lambda: Checkpointed(False), (8,)),
    "reentrant checkpoint": (lambda: Checkpointed(True), (8,)),
    "tied": (Tied, "7:int64"),
    "bag": (lambda: nn.EmbeddingBag(10, 6), "7:int64"),
    "normalised weight": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)), (6,)),
}
"""Small networks by name: what makes one, and the shape of its input."""
