"""DeiT without distillation (Touvron et al., ICML 2021, arXiv 2012.12877), laid out and named as in timm.

A vision transformer (Dosovitskiy et al., ICLR 2021, arXiv 2010.11929): the image is cut into patches of 16x16
pixels, each becomes a token, and a class token goes with them; its last state is classified.
"""

from __future__ import annotations

from lance_ref import functional as F
from lance_ref import nn
from lance_ref.engine.tensor import Tensor
from lance_ref.models.initialise import Rng, check_positive_int, normal_weight, source
from lance_ref.models.register import net
from lance_ref.nn.init import normal_parameter
from lance_ref.nn.module import Parameter

PATCH = 16
DEPTH = 12
MLP_RATIO = 4
EPS = 1e-6
"""Added to the variance by every layer norm."""
STD = 0.02
"""The standard deviation of the initial weights: linear layers, the class token, position embeddings."""


class PatchEmbed(nn.Module):
    """``proj``: a convolution of which each position is one patch, as a token of ``dim`` features."""

    def __init__(self, image_size: int, dim: int, rng: Rng) -> None:
        super().__init__()
        self.image_size = image_size
        self.proj = nn.Conv2d(3, dim, PATCH, PATCH, rng=rng)

    def forward(self, x: Tensor) -> Tensor:
        side = self.image_size
        if x.ndim != 4 or x.shape[1:] != (3, side, side):
            raise ValueError(f"DeiT: x has shape {x.shape}, expected (B, 3, {side}, {side}), as image_size is {side}")
        return F.flatten(self.proj(x), 2).transpose(1, 2)  # (B, C, H/16, W/16) to (B, L, C)


class Mlp(nn.Module):
    """fc2(gelu(fc1(x))), four times as wide inside."""

    def __init__(self, dim: int, rng: Rng) -> None:
        super().__init__()
        self.fc1 = _linear(dim, MLP_RATIO * dim, rng)
        self.act = nn.GELU()
        self.fc2 = _linear(MLP_RATIO * dim, dim, rng)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """x + attn(norm1(x)), then x + mlp(norm2(x))."""

    def __init__(self, dim: int, num_heads: int, rng: Rng) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, EPS)
        self.attn = nn.SelfAttention(dim, num_heads, rng=rng)
        for linear in (self.attn.qkv, self.attn.proj):
            normal_weight(linear, STD, rng)
        self.norm2 = nn.LayerNorm(dim, EPS)
        self.mlp = Mlp(dim, rng)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))  # (B, N, C)
        return x + self.mlp(self.norm2(x))


class Tokens(nn.Module):
    """The tokens of an image, the class token first: [class, patches] + positions.

    The class token is the same for all images. So it is added to the first row of the positions, once, and
    the images get a row of zeros for it: the same numbers as if it were repeated for each of them.
    """

    def __init__(self, cls_token: Parameter, pos_embed: Parameter, patch_embed: PatchEmbed) -> None:
        super().__init__()
        self.cls_token, self.pos_embed, self.patch_embed = cls_token, pos_embed, patch_embed

    def forward(self, x: Tensor) -> Tensor:
        return _tokens(self.patch_embed(x), self.cls_token, self.pos_embed)


class ClassToken(nn.Module):
    """The first token alone: (B, N, C) to (B, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, 0]


class DeiT(nn.Module):
    """``cls_token pos_embed patch_embed blocks.0`` … ``blocks.11 norm head``; see :func:`deit_tiny`.

    Parameters
    ----------
    dim : int
        Features C of a token.
    num_heads : int
        Of each attention.
    image_size : int
        Height and width; there are N = (image_size / 16)² + 1 tokens, each with its own position embedding.
    """

    def __init__(self, dim: int, num_heads: int, num_classes: int, image_size: int, rng: Rng) -> None:
        super().__init__()
        self.cls_token = normal_parameter((1, 1, dim), STD, rng)
        self.pos_embed = normal_parameter((1, (image_size // PATCH) ** 2 + 1, dim), STD, rng)
        self.patch_embed = PatchEmbed(image_size, dim, rng)
        self.blocks = nn.Sequential(*(Block(dim, num_heads, rng) for _ in range(DEPTH)))
        self.norm = nn.LayerNorm(dim, EPS)
        self.head = _linear(dim, num_classes, rng)

    def forward(self, x: Tensor) -> Tensor:
        x = _tokens(self.patch_embed(x), self.cls_token, self.pos_embed)  # (B, N, C)
        x = self.norm(self.blocks(x))  # (B, N, C)
        return self.head(x[:, 0])  # (B, num_classes)

    def stages(self) -> list[nn.Module]:
        """Modules whose composition is ``forward``: the tokens, each block, the head with the norm before it."""
        tokens = Tokens(self.cls_token, self.pos_embed, self.patch_embed)
        return [tokens, *self.blocks, nn.Sequential(self.norm, ClassToken(), self.head)]


@net("deit-tiny", small_shape=(3, 48, 48), options_for=lambda shape: {"image_size": shape[-1]})
def deit_tiny(num_classes: int = 1000, image_size: int = 224, rng: Rng = None) -> DeiT:
    """DeiT-Tiny for RGB images (B, 3, image_size, image_size), a multiple of 16: 192 features, 3 heads, 12 blocks.

    Notes
    -----
    As published, linear layers, class token and position embeddings start from N(0, 0.02²) (the cut at ±2 of the
    authors' program never happens), biases from 0, the patches' convolution from PyTorch's default. Stochastic
    depth, with which the authors train, is left out.

    For :func:`lance_ref.tune` a block has four layers, ``attn.qkv``, ``attn.proj``, ``mlp.fc1`` and ``mlp.fc2``; it
    freezes layer norms, class token and positions.
    """
    return _deit(192, 3, num_classes, image_size, rng)


@net("deit-small", small_shape=(3, 48, 48), options_for=lambda shape: {"image_size": shape[-1]})
def deit_small(num_classes: int = 1000, image_size: int = 224, rng: Rng = None) -> DeiT:
    """DeiT-Small: 384 features, 6 heads, 12 blocks; parameters as for :func:`deit_tiny`."""
    return _deit(384, 6, num_classes, image_size, rng)


def _deit(dim: int, num_heads: int, num_classes: int, image_size: int, rng: Rng) -> DeiT:
    check_positive_int("num_classes", num_classes)
    check_positive_int("image_size", image_size)
    if image_size % PATCH:
        raise ValueError(f"image_size is {image_size}, expected a multiple of {PATCH}")
    return DeiT(dim, num_heads, num_classes, image_size, source(rng))


def _tokens(patches: Tensor, cls_token: Tensor, pos_embed: Tensor) -> Tensor:
    """[class, patches] + positions, see :class:`Tokens`."""
    positions = F.concatenate([cls_token + pos_embed[:, :1], pos_embed[:, 1:]], dim=1)  # (1, N, C)
    return F.pad(patches, (0, 0, 1, 0)) + positions  # (B, N, C)


def _linear(I: int, O: int, rng: Rng) -> nn.Linear:  # noqa: E741  (in and out features, as everywhere)
    return normal_weight(nn.Linear(I, O, rng=rng), STD, rng)
