"""A PyTorch implementation as an adapter: the example for one of your own.

    python -m lance_ref.conformance --check examples.torch_adapter:adapter

What each function gets and returns is specified in docs/conformance.md. Functions that are not here are skipped.
"""

import torch
from torch.nn import functional as F


class TorchAdapter:
    def forward(self, activation, weight, bias, geometry):
        return layer(*tensors(activation, weight, bias), geometry).numpy()

    def input_gradient(self, weight, grad_output, geometry):
        weight, grad_output = tensors(weight, grad_output)
        activation = weight.new_zeros(geometry["input_shape"], requires_grad=True)
        return gradient(layer(activation, weight, None, geometry), activation, grad_output)

    def bias_gradient(self, grad_output, geometry):
        (grad_output,) = tensors(grad_output)
        activation, weight = (grad_output.new_zeros(geometry[name]) for name in ("input_shape", "weight_shape"))
        bias = grad_output.new_zeros(geometry["weight_shape"][0], requires_grad=True)
        return gradient(layer(activation, weight, bias, geometry), bias, grad_output)

    def project(self, activation, factors):
        return mode_products(activation, [None if U is None else U.T for U in factors]).numpy()

    def weight_gradient(self, core, factors, grad_output, geometry):
        activation, (grad_output,) = mode_products(core, factors), tensors(grad_output)
        weight = activation.new_zeros(geometry["weight_shape"], requires_grad=True)
        return gradient(layer(activation, weight, None, geometry), weight, grad_output)

    def saved_bytes(self, activation, factors):
        return torch.from_numpy(self.project(activation, factors)).untyped_storage().nbytes()

    def gram(self, activations, mode):
        rows = [A.double().movedim(mode, 0).flatten(1) for A in tensors(*activations)]  # (n, everything else)
        return sum(R @ R.T for R in rows).numpy()

    def leading_directions(self, gram, epsilon):
        energies, vectors = torch.linalg.eigh(torch.from_numpy(gram))  # ascending
        kept = energies.flip(0).cumsum(0) / energies.sum()
        rank = len(gram) if epsilon == 1 else int((kept < epsilon).sum()) + 1
        return vectors.flip(1)[:, :rank].numpy()

    def calibrate(self, activations, epsilon, modes, protected, mean_free):
        if protected.size or mean_free:
            raise NotImplementedError("protected directions")
        grams = [self.gram(activations, mode) if compressed else None for mode, compressed in enumerate(modes)]
        return [None if K is None else self.leading_directions(K, epsilon) for K in grams]


def tensors(*arrays):
    return [torch.from_numpy(array) for array in arrays]


def layer(activation, weight, bias, geometry):
    if geometry["kind"] == "linear":
        return F.linear(activation, weight, bias)
    (top, bottom), (left, right) = geometry["padding"]
    padded = F.pad(activation, (left, right, top, bottom))
    return F.conv2d(padded, weight, bias, geometry["stride"], 0, geometry["dilation"], geometry["groups"])


def gradient(output, wanted, grad_output):
    return torch.autograd.grad(output, wanted, grad_output)[0].numpy()


def mode_products(array, matrices):
    (tensor,) = tensors(array)
    for mode, M in enumerate(matrices):
        if M is not None:  # (.., n, ..) with (J, n) to (.., J, ..)
            tensor = torch.tensordot(tensor, torch.from_numpy(M), ([mode], [1])).movedim(-1, mode)
    return tensor.contiguous()


adapter = TorchAdapter()
