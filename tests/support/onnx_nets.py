"""Two PyTorch networks that are exported to ONNX, and the same two written with the library's layers."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from lance_ref import F, Tensor, nn
from lance_ref.nn.module import Parameter

PIXELS = 16
DIM, HEADS, TOKENS, CLASSES = 12, 3, 17, 5


def torch_cnn(torch: Any) -> Any:
    """What MobileNets and ResNets are made of: a depthwise block with a residual, ReLU6, a pool, Hardswish, dropout."""
    tnn = torch.nn

    class Block(tnn.Module):
        def __init__(self, C: int) -> None:
            super().__init__()
            wide = 3 * C
            self.layers = tnn.Sequential(
                *(tnn.Conv2d(C, wide, 1, bias=False), tnn.BatchNorm2d(wide), tnn.ReLU6()),
                *(tnn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False), tnn.BatchNorm2d(wide), tnn.ReLU6()),
                *(tnn.Conv2d(wide, C, 1, bias=False), tnn.BatchNorm2d(C)),
            )

        def forward(self, x: Any) -> Any:
            return x + self.layers(x)

    class Net(tnn.Module):
        def __init__(self) -> None:
            super().__init__()
            stem = (tnn.Conv2d(3, 8, 3, 2, 1), tnn.BatchNorm2d(8), tnn.ReLU(), tnn.MaxPool2d(2))
            self.features = tnn.Sequential(*stem, Block(8), tnn.Conv2d(8, 14, 3, stride=2, groups=2), tnn.Hardswish())
            self.dropout, self.head = tnn.Dropout(0.2), tnn.Linear(14, CLASSES)

        def forward(self, x: Any) -> Any:
            pooled = tnn.functional.adaptive_avg_pool2d(self.features(x), 1)
            return self.head(self.dropout(pooled.flatten(1)))

    return Net()


class Residual(nn.Module):
    def __init__(self, C: int) -> None:
        super().__init__()
        wide = 3 * C
        self.layers = nn.Sequential(
            *(nn.Conv2d(C, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6()),
            *(nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.ReLU6()),
            *(nn.Conv2d(wide, C, 1, bias=False), nn.BatchNorm2d(C)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class Cnn(nn.Module):
    """As :func:`torch_cnn`."""

    def __init__(self) -> None:
        super().__init__()
        stem = (nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))
        self.features = nn.Sequential(*stem, Residual(8), nn.Conv2d(8, 14, 3, stride=2, groups=2), nn.Hardswish())
        self.dropout, self.head = nn.Dropout(0.2), nn.Linear(14, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        pooled = F.adaptive_avg_pool2d(self.features(x), 1)
        return self.head(self.dropout(pooled.flatten(1)))


def torch_vit(torch: Any, fused: bool = False) -> Any:
    """Two blocks of a vision transformer with a class token; ``fused``: attention by PyTorch's own function."""
    tnn = torch.nn

    class Attention(tnn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.proj = tnn.Linear(DIM, 3 * DIM), tnn.Linear(DIM, DIM)

        def forward(self, x: Any) -> Any:
            B, N, C = x.shape
            q, k, v = self.qkv(x).reshape(B, N, 3, HEADS, C // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
            if fused:
                mixed = tnn.functional.scaled_dot_product_attention(q, k, v)
            else:
                mixed = ((q @ k.transpose(-2, -1)) * (C // HEADS) ** -0.5).softmax(-1) @ v
            return self.proj(mixed.transpose(1, 2).reshape(B, N, C))

    class Block(tnn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.attn, self.norm2 = tnn.LayerNorm(DIM), Attention(), tnn.LayerNorm(DIM)
            self.mlp = tnn.Sequential(tnn.Linear(DIM, 2 * DIM), tnn.GELU(), tnn.Linear(2 * DIM, DIM))

        def forward(self, x: Any) -> Any:
            x = x + self.attn(self.norm1(x))
            return x + self.mlp(self.norm2(x))

    class Net(tnn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches = tnn.Conv2d(3, DIM, 4, 4)
            self.token = tnn.Parameter(torch.randn(1, 1, DIM))
            self.positions = tnn.Parameter(torch.randn(1, TOKENS, DIM))
            self.blocks = tnn.Sequential(Block(), Block())
            self.norm, self.head = tnn.LayerNorm(DIM), tnn.Linear(DIM, CLASSES)

        def forward(self, x: Any) -> Any:
            x = self.patches(x).flatten(2).transpose(1, 2)
            x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.positions
            return self.head(self.norm(self.blocks(x))[:, 0])

    return Net()


class VitBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(DIM), nn.SelfAttention(DIM, HEADS), nn.LayerNorm(DIM)
        self.mlp = nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Vit(nn.Module):
    """As :func:`torch_vit`."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, DIM, 4, 4)
        self.token = Parameter(np.zeros((1, 1, DIM), np.float32))
        self.positions = Parameter(np.zeros((1, TOKENS, DIM), np.float32))
        self.blocks = nn.Sequential(VitBlock(), VitBlock())
        self.norm, self.head = nn.LayerNorm(DIM), nn.Linear(DIM, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = F.cat([F.expand(self.token, (x.shape[0], 1, DIM)), x], 1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])


def export(
    torch: Any, net: Any, opset: int = 17, training: bool = False, dynamic: bool = True, batch: int = 2
) -> bytes:
    """The net as PyTorch's older exporter writes it, in a fraction of a second."""
    stream = io.BytesIO()
    axes = {"dynamic_axes": {"x": {0: "batch"}}} if dynamic else {}
    mode = torch.onnx.TrainingMode.TRAINING if training else torch.onnx.TrainingMode.EVAL
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            net,
            (torch.randn(batch, 3, PIXELS, PIXELS),),
            stream,
            dynamo=False,
            input_names=["x"],
            opset_version=opset,
            training=mode,
            do_constant_folding=not training,
            **axes,
        )
    return stream.getvalue()


NEWER = Path(__file__).parents[1] / "data" / "vit.onnx"
"""What :func:`export_anew` made of :func:`torch_vit` with PyTorch 2.13: the newer exporter takes a while."""


def export_anew(torch: Any, net: Any, file: Path) -> None:
    """The net as PyTorch's newer exporter writes it, values beside the file; notes on source files are left out."""
    import onnx

    torch.onnx.export(
        net.eval(),
        (torch.randn(2, 3, PIXELS, PIXELS),),
        file,
        dynamo=True,
        verbose=False,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
    )
    model = onnx.load(file, load_external_data=False)
    del model.metadata_props[:], model.graph.metadata_props[:], model.graph.value_info[:]
    for node in model.graph.node:
        node.doc_string = ""
        scopes = [entry for entry in node.metadata_props if entry.key.endswith("name_scopes")]
        del node.metadata_props[:]
        node.metadata_props.extend(scopes)
    onnx.save(model, file)
