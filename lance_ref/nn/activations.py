"""Activation functions as layers.

``inplace`` is taken as PyTorch's layers take it, and has no effect: every operation here makes a new array.
"""

from __future__ import annotations

from lance_ref import functional as F
from lance_ref.engine.tensor import Tensor
from lance_ref.nn.init import constant_parameter
from lance_ref.nn.layers import positive_integers
from lance_ref.nn.module import Module


class Activation(Module):
    """A function without parameters. ``inplace`` is taken as PyTorch's layers take it: the result is a new array."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()


class ReLU(Activation):
    """max(x, 0)"""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x)


class ReLU6(Activation):
    """min(max(x, 0), 6)"""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu6(x)


class Hardswish(Activation):
    """x·relu6(x + 3) / 6"""

    def forward(self, x: Tensor) -> Tensor:
        return F.hardswish(x)


class Hardsigmoid(Activation):
    """relu6(x + 3) / 6"""

    def forward(self, x: Tensor) -> Tensor:
        return F.hardsigmoid(x)


class GELU(Module):
    """x·Φ(x), exact, or with Φ by tanh: ``approximate`` is "none" or "tanh"."""

    def __init__(self, approximate: str = "none") -> None:
        super().__init__()
        if approximate not in ("none", "tanh"):
            raise ValueError(f"GELU: approximate is {approximate!r}, expected 'none' or 'tanh'")
        self.approximate = approximate

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu_tanh(x) if self.approximate == "tanh" else F.gelu(x)

    def extra_repr(self) -> str:
        return "" if self.approximate == "none" else f"approximate={self.approximate!r}"


class Sigmoid(Module):
    """1 / (1 + e^−x)"""

    def forward(self, x: Tensor) -> Tensor:
        return F.sigmoid(x)


class Tanh(Module):
    """Hyperbolic tangent."""

    def forward(self, x: Tensor) -> Tensor:
        return F.tanh(x)


class Softmax(Module):
    """e^x / Σ e^x along ``dim``."""

    def __init__(self, dim: int = -1) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        return F.softmax(x, self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


class SiLU(Activation):
    """x / (1 + e^−x), also called swish."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x)


class Mish(Activation):
    """x·tanh(ln(1 + e^x))"""

    def forward(self, x: Tensor) -> Tensor:
        return F.mish(x)


class LeakyReLU(Activation):
    """x above 0 and negative_slope·x below."""

    def __init__(self, negative_slope: float = 0.01, inplace: bool = False) -> None:
        super().__init__(inplace)
        self.negative_slope = negative_slope

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(x, self.negative_slope)

    def extra_repr(self) -> str:
        return f"negative_slope={self.negative_slope}"


class ELU(Activation):
    """x above 0 and alpha·(e^x − 1) below."""

    def __init__(self, alpha: float = 1.0, inplace: bool = False) -> None:
        super().__init__(inplace)
        self.alpha = alpha

    def forward(self, x: Tensor) -> Tensor:
        return F.elu(x, self.alpha)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}"


class Softplus(Module):
    """ln(1 + e^(beta·x)) / beta, and x itself where beta·x is above ``threshold``."""

    def __init__(self, beta: float = 1.0, threshold: float = 20.0) -> None:
        super().__init__()
        self.beta, self.threshold = beta, threshold

    def forward(self, x: Tensor) -> Tensor:
        return F.softplus(x, self.beta, self.threshold)

    def extra_repr(self) -> str:
        return f"beta={self.beta}, threshold={self.threshold}"


class PReLU(Module):
    """x above 0 and weight·x below.

    Parameters
    ----------
    num_parameters : int
        1, or the number of channels C.
    init : float
        The slopes at the beginning.

    Attributes
    ----------
    weight : Parameter (num_parameters,)
    """

    def __init__(self, num_parameters: int = 1, init: float = 0.25) -> None:
        super().__init__()
        (self.num_parameters,) = positive_integers("PReLU", num_parameters=num_parameters)
        self.weight = constant_parameter((self.num_parameters,), init)

    def forward(self, x: Tensor) -> Tensor:
        return F.prelu(x, self.weight)

    def extra_repr(self) -> str:
        return f"num_parameters={self.num_parameters}"


class GLU(Module):
    """a·σ(b) of the two halves of the input along ``dim``."""

    def __init__(self, dim: int = -1) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        return F.glu(x, self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"
