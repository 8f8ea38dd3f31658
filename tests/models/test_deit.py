"""DeiT: sizes and names of the original, PyTorch's numbers, tokens and positions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from torch_twins import check_twin, perturb

from lance_ref import Tensor, models, nn, no_grad, trace, tune
from lance_ref.nn import init


def on_shapes(name: str, **options: Any) -> nn.Module:
    with init.shapes_only():
        return models.create(name, **options)


@pytest.mark.parametrize(("name", "parameters", "gmacs"), [("tiny", 5_717_416, 1.3), ("small", 22_050_664, 4.6)])
def test_size_is_the_published_one(name: str, parameters: int, gmacs: float) -> None:
    """Another width, depth or bias; and the products at 224 pixels, counted here by hand."""
    net = on_shapes(f"deit-{name}")
    assert sum(p.size for p in net.parameters()) == parameters
    dim, N = {"tiny": 192, "small": 384}[name], 197
    block = N * dim * (3 + 1 + 4 + 4) * dim + 2 * N * N * dim
    macs = 196 * dim * 3 * 256 + 12 * block + dim * 1000
    assert round(macs / 1e9, 1) == gmacs
    sizes = {"conv2d": 3 * 256, "linear": 0, "matmul": 0}
    records = [r for r in trace(net, (1, 3, 224, 224)) if r.op in sizes]
    assert sum(r.output.size * (sizes[r.op] or r.inputs[0].shape[-1]) for r in records) == macs


def test_names_are_timms() -> None:
    """State dictionaries would not carry over."""
    shapes = {name: p.shape for name, p in on_shapes("deit-tiny", num_classes=7).named_parameters()}
    top = ["cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"]
    parts = ["norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"]
    expected = top + [f"blocks.{i}.{part}.{p}" for i in range(12) for part in parts for p in ("weight", "bias")]
    assert list(shapes) == [*expected, "norm.weight", "norm.bias", "head.weight", "head.bias"]
    assert shapes["cls_token"] == (1, 1, 192)
    assert shapes["pos_embed"] == (1, 197, 192)
    assert shapes["blocks.3.attn.qkv.weight"] == (576, 192)
    assert shapes["blocks.3.mlp.fc2.weight"] == (192, 768)


def deit_twin(torch: Any, dim: int, heads: int, tokens: int, classes: int) -> Any:
    """DeiT from torch.nn alone; attention by PyTorch's own kernel, the class token joined to every image."""
    tnn = torch.nn

    class Attention(tnn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.proj = tnn.Linear(dim, 3 * dim), tnn.Linear(dim, dim)

        def forward(self, x: Any) -> Any:
            cut = [part.unflatten(2, (heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=2)]
            return self.proj(tnn.functional.scaled_dot_product_attention(*cut).transpose(1, 2).flatten(2))

    class Block(tnn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = (tnn.LayerNorm(dim, eps=1e-6) for _ in range(2))
            self.attn, self.mlp = Attention(), tnn.Module()
            self.mlp.fc1, self.mlp.fc2 = tnn.Linear(dim, 4 * dim), tnn.Linear(4 * dim, dim)

        def forward(self, x: Any) -> Any:
            x = x + self.attn(self.norm1(x))
            return x + self.mlp.fc2(tnn.functional.gelu(self.mlp.fc1(self.norm2(x))))

    class Twin(tnn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cls_token = tnn.Parameter(torch.zeros(1, 1, dim))
            self.pos_embed = tnn.Parameter(torch.zeros(1, tokens, dim))
            self.patch_embed = tnn.Module()
            self.patch_embed.proj = tnn.Conv2d(3, dim, 16, 16)
            self.blocks = tnn.Sequential(*(Block() for _ in range(12)))
            self.norm, self.head = tnn.LayerNorm(dim, eps=1e-6), tnn.Linear(dim, classes)

        def forward(self, x: Any) -> Any:
            patches = self.patch_embed.proj(x).flatten(2).transpose(1, 2)
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), patches], dim=1) + self.pos_embed
            return self.head(self.norm(self.blocks(x))[:, 0])

    return Twin()


@pytest.mark.parametrize(("name", "dim", "heads"), [("deit-tiny", 192, 3), ("deit-small", 384, 6)])
def test_equals_pytorch(name: str, dim: int, heads: int) -> None:
    """Logits and all gradients; positions, class token, heads or GELU off and they differ."""
    torch = pytest.importorskip("torch")
    net = models.create(name, num_classes=5, image_size=32, rng=0)
    perturb(net)
    x = np.random.default_rng(1).normal(size=(2, 3, 32, 32))
    check_twin(net, deit_twin(torch, dim, heads, 5, 5), x, np.array([1, 4]))


def test_approximate_gelu_is_caught() -> None:
    """Planted: the tanh form of GELU, which differs by 1e-4."""
    torch = pytest.importorskip("torch")
    net = models.create("deit-tiny", num_classes=5, image_size=32, rng=0)
    perturb(net)
    net.blocks[5].mlp.act.forward = lambda x: Tensor(
        torch.nn.functional.gelu(torch.tensor(x.data), approximate="tanh").numpy()
    )
    with pytest.raises(AssertionError, match="logits"):
        check_twin(net, deit_twin(torch, 192, 3, 5, 5), np.ones((1, 3, 32, 32)), np.array([1]))


def test_patches_are_read_row_by_row() -> None:
    """Token 1 + i is patch i, from left to right, then down; another order would not fit the published positions."""
    net = models.create("deit-tiny", image_size=48, rng=0)
    tokens = net.stages()[0]
    black = np.zeros((1, 3, 48, 48), np.float32)
    with no_grad():
        base = tokens(Tensor(black)).data
        for i in range(9):
            image = black.copy()
            image[:, :, 16 * (i // 3) : 16 * (i // 3 + 1), 16 * (i % 3) : 16 * (i % 3 + 1)] = 1
            changed = (tokens(Tensor(image)).data != base).any(axis=(0, 2))
            assert np.flatnonzero(changed).tolist() == [1 + i]
    np.testing.assert_array_equal(base[0, 0], (net.cls_token.data + net.pos_embed.data)[0, 0])


def test_initial_values() -> None:
    """As published: 0.02 for all linear layers and embeddings, biases 0, norms 1."""
    net = models.create("deit-tiny", num_classes=1000, image_size=224, rng=0)
    state = net.state_dict()
    for name in ("pos_embed", "head.weight", "blocks.0.attn.qkv.weight", "blocks.11.mlp.fc2.weight"):
        assert state[name].std() == pytest.approx(0.02, rel=0.02)
    assert not any(array.any() for name, array in state.items() if name.endswith("bias") and "patch" not in name)
    assert state["blocks.4.norm2.weight"].tolist() == [1] * 192
    assert np.abs(state["patch_embed.proj.weight"]).max() == pytest.approx(1 / np.sqrt(768), rel=1e-3)
    again = models.create("deit-tiny", num_classes=1000, image_size=224, rng=0).state_dict()
    assert all((array == again[name]).all() for name, array in state.items())


def test_tuning_counts_linear_layers() -> None:
    """The last four layers are those of the last block; norms, class token and positions are frozen."""
    net = models.create("deit-tiny", num_classes=3, image_size=32, rng=0)
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert tune(net, "last:4").layers == tuple(f"blocks.11.{layer}" for layer in layers)
    assert net.tuning.head == "head"
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    assert trained == {f"blocks.11.{layer}.{p}" for layer in layers for p in ("weight", "bias")} | {
        "head.weight",
        "head.bias",
    }
    assert len(tune(net, "all").layers) == 1 + 4 * 12


@pytest.mark.parametrize("shape", [(1, 3, 64, 16), (1, 3, 48, 48), (1, 1, 32, 32), (3, 32, 32)])
def test_an_image_of_another_size_is_refused(shape: tuple[int, ...]) -> None:
    """64x16 pixels give as many patches as 32x32, but the positions would be wrong."""
    with pytest.raises(ValueError, match=r"expected \(B, 3, 32, 32\), as image_size is 32"):
        trace(on_shapes("deit-tiny", image_size=32), shape)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 40}, "image_size is 40, expected a multiple of 16"),
        ({"image_size": 0}, "image_size is 0"),
        ({"num_classes": -3}, "num_classes is -3"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    """An option out of range must be named, not fail inside a layer."""
    with pytest.raises(ValueError, match=message):
        models.create("deit-small", **options)
