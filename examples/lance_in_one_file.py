"""LANCE in one file: ``python examples/lance_in_one_file.py [DIGITS.npz]``

Low-rank activation compression (Apolinario and Roy, arXiv:2509.21617) with NumPy alone and without the library. A
small network learns to read digits of 8×8 pixels. Backpropagation has to keep the input A of a convolution until the
backward pass. LANCE keeps a small core S of it instead, seen in directions U₁ … U₄ that are found once, before
training. The output of the layer and the gradient of its input stay exact; only the weight gradient is approximate.

The numbers of the equations are those of docs/what_lance_is.md. They count modes from 1, as the paper does: batch,
channel, height, width. Code counts from 0: ``factors[0]`` is U₁.
"""

import sys
from pathlib import Path

import numpy as np

DIGITS = Path(__file__).parents[1] / "lance_ref" / "datasets" / "digits.npz"
BATCH, EPSILON, RATE = 64, 0.95, 0.2


def unfold(A, mode):
    """A_(n): the given mode in the rows, all others in the columns."""
    return np.moveaxis(A, mode, 0).reshape(A.shape[mode], -1)


def mode_product(A, M, mode):
    """A ×_n M: every fibre of the given mode, multiplied by the matrix M."""
    return np.moveaxis(np.tensordot(M, A, axes=(1, mode)), 0, mode)


# ---- before training: calibrate --------------------------------------------------------------------------------


def calibrate(activations, epsilon=EPSILON):
    """One orthonormal factor for each mode, from a stream of activations of which none is kept."""
    # (1)  K_n = Σ_j A⁽ʲ⁾_(n) A⁽ʲ⁾_(n)ᵀ, the Gram matrix of mode n, summed over the calibration batches
    grams = [0, 0, 0, 0]
    for A in activations:
        for mode in range(4):
            A_n = unfold(A, mode).astype(np.float64)
            grams[mode] = grams[mode] + A_n @ A_n.T

    factors = []
    for K in grams:
        # (2)  K_n = V diag(λ) Vᵀ: eigh sorts the energies upwards, we want the largest first
        energies, V = np.linalg.eigh(K)
        energies, V = energies[::-1], V[:, ::-1]
        # (3)  r_n = min { r : λ_1 + … + λ_r ≥ ε Σ_j λ_j }, and U_n = the first r_n columns of V
        held = np.cumsum(energies)
        rank = int(np.argmax(held >= epsilon * held[-1])) + 1
        factors.append(V[:, :rank])
    return factors


# ---- forward: project ------------------------------------------------------------------------------------------


def project(A, factors):
    """The core, which is all that LANCE keeps of an activation."""
    # (4)  S = A ×₁ U₁ᵀ ×₂ U₂ᵀ ×₃ U₃ᵀ ×₄ U₄ᵀ
    for mode, U in enumerate(factors):
        A = mode_product(A, U.T, mode)
    return A


# ---- backward: the weight gradient from the core, in the order of the papers -------------------------------------


def weight_gradient(S, factors, G, kernel, stride, padding):
    """The weight gradient of Ã = S ×₁ U₁ ×₂ U₂ ×₃ U₃ ×₄ U₄, without ever forming Ã, which is as large as A."""
    U1, U2, U3, U4 = factors
    # (5)  Z₁ = G ×₁ U₁ᵀ: only r₁ combinations of the images are left of the output gradient
    Z1 = mode_product(G, U1.T, 0)  # (r₁, C', H', W')
    # (6)  Z₂ = S ×₃ U₃ ×₄ U₄: height and width in full again, but r₁·r₂ maps in the place of B·C. Rows of zeros
    #      around U₃ and U₄ pad every map, because the border of an image is zero in every direction.
    rows, columns = (np.pad(U, ((padding, padding), (0, 0))) for U in (U3, U4))
    Z2 = mode_product(mode_product(S, rows, 2), columns, 3)  # (r₁, r₂, H + 2·padding, W + 2·padding)
    # (7)  Z₃[o, c, p, q] = Σ_{r,h,w} Z₁[r, o, h, w] Z₂[r, c, s·h + p, s·w + q]: the usual correlation, of small things
    Z3 = correlate(Z1, Z2, kernel, stride)  # (C', r₂, k, k)
    # (8)  dŴ = Z₃ ×₂ U₂: the channels in full again
    return mode_product(Z3, U2, 1)  # (C', C, k, k)


def correlate(G, padded, kernel, stride):
    """Σ over images and places of output gradient times input, for each place (p, q) of the kernel."""
    dW = np.zeros((G.shape[1], padded.shape[1], kernel, kernel), G.dtype)
    for p, q, seen in windows(padded, G.shape[2:], kernel, stride):
        dW[:, :, p, q] = np.tensordot(G, seen, axes=((0, 2, 3), (0, 2, 3)))
    return dW


def windows(padded, size, kernel, stride):
    """For each place (p, q) of the kernel a view of the pixels that it meets, one for each place of the output."""
    H, W = size
    for p in range(kernel):
        for q in range(kernel):
            yield p, q, padded[:, :, p : p + stride * H : stride, q : q + stride * W : stride]


# ---- a convolution, and a network of two of them and a linear layer ----------------------------------------------


def pad(A, n):
    """n zeros on each of the four sides of every map."""
    return np.pad(A, ((0, 0), (0, 0), (n, n), (n, n)))


def convolve(A, W, b, stride, padding):
    """(9)  Y[n, o, h, w] = b[o] + Σ_{c,p,q} W[o, c, p, q] A[n, c, s·h + p − padding, s·w + q − padding]"""
    kernel = W.shape[2]
    size = [(n + 2 * padding - kernel) // stride + 1 for n in A.shape[2:]]
    Y = np.zeros((len(A), len(W), *size), A.dtype)
    for p, q, seen in windows(pad(A, padding), size, kernel, stride):
        Y += np.einsum("oc,nchw->nohw", W[:, :, p, q], seen, optimize=True)
    return Y + b[:, None, None]


def input_gradient(G, W, shape, stride, padding):
    """(10)  dA: every pixel gathers from the outputs that it took part in. It needs W, not A: LANCE leaves it exact."""
    dA = pad(np.zeros(shape, G.dtype), padding)
    for p, q, seen in windows(dA, G.shape[2:], W.shape[2], stride):
        seen += np.einsum("oc,nohw->nchw", W[:, :, p, q], G, optimize=True)  # a view: this adds to dA
    return dA[:, :, padding : shape[2] + padding, padding : shape[3] + padding]


def initial_parameters(rng, dtype=np.float32):
    """Weights W1 (16, 1, 3, 3), W2 (32, 16, 3, 3), W3 (10, 512), uniform in ±1/√(numbers that enter), and biases b."""
    shapes = {"1": (16, 1, 3, 3), "2": (32, 16, 3, 3), "3": (10, 512)}
    parameters = {}
    for i, shape in shapes.items():
        bound = 1 / np.sqrt(np.prod(shape[1:]))
        parameters["W" + i] = rng.uniform(-bound, bound, shape).astype(dtype)
        parameters["b" + i] = np.zeros(shape[0], dtype)
    return parameters


def forward(P, x):
    """The input of each layer (images, A of the second convolution, features of the linear layer), and the scores."""
    A = np.maximum(convolve(x, P["W1"], P["b1"], stride=1, padding=1), 0)  # (B, 16, 8, 8): what LANCE compresses
    Y = np.maximum(convolve(A, P["W2"], P["b2"], stride=2, padding=1), 0)  # (B, 32, 4, 4)
    features = Y.reshape(len(x), -1)  # (B, 512)
    return A, features, features @ P["W3"].T + P["b3"]


def gradients(P, x, labels, factors=None):
    """The gradients of the mean cross-entropy of a batch, and what was kept of A: A itself, or its core."""
    A, features, scores = forward(P, x)
    kept = A if factors is None else project(A, factors)
    positive, shape = A > 0, A.shape  # the mask of the first ReLU: one bit for each number
    del A  # from here on there is only `kept`

    scores = np.exp(scores - scores.max(axis=1, keepdims=True))
    G = scores / scores.sum(axis=1, keepdims=True)  # softmax
    G[np.arange(len(x)), labels] -= 1
    G /= len(x)
    g = {"W3": G.T @ features, "b3": G.sum(axis=0)}
    G = ((G @ P["W3"]) * (features > 0)).reshape(len(x), 32, 4, 4)  # gradient of the second convolution's output
    if factors is None:
        g["W2"] = correlate(G, pad(kept, 1), kernel=3, stride=2)  # backpropagation
    else:
        g["W2"] = weight_gradient(kept, factors, G, kernel=3, stride=2, padding=1)
    g["b2"] = G.sum(axis=(0, 2, 3))
    G = input_gradient(G, P["W2"], shape, stride=2, padding=1) * positive
    g["W1"], g["b1"] = correlate(G, pad(x, 1), kernel=3, stride=1), G.sum(axis=(0, 2, 3))
    return g, kept


def train(P, x, labels, epochs, rng, factors=None):
    """Gradient descent on batches of one size; the factor of the batch mode has one row for each image."""
    for _ in range(epochs):
        order = rng.permutation(len(x))
        for start in range(0, len(x) - BATCH + 1, BATCH):
            batch = order[start : start + BATCH]
            g, kept = gradients(P, x[batch], labels[batch], factors)
            P = {name: P[name] - RATE * g[name] for name in P}
    return P, kept


def accuracy(P, x, labels):
    return np.mean(forward(P, x)[2].argmax(axis=1) == labels)


def main(path=DIGITS):
    with np.load(path) as file:
        x, labels = file["x"][:, None].astype(np.float32) / 16, file["y"].astype(int)
    x, labels, test_x, test_labels = x[:1437], labels[:1437], x[1437:], labels[1437:]
    start, _ = train(initial_parameters(np.random.default_rng(0)), x, labels, 2, np.random.default_rng(1))
    factors = calibrate(forward(start, x[i : i + BATCH])[0] for i in range(0, 8 * BATCH, BATCH))
    factors = [U.astype(np.float32) for U in factors]
    exact, A = train(start, x, labels, 10, np.random.default_rng(2))
    lance, S = train(start, x, labels, 10, np.random.default_rng(2), factors)

    print(f"kept of the activation {A.shape}: {A.nbytes:,} bytes exactly, {S.nbytes:,} bytes as a core {S.shape}")
    print(f"factors, once for all steps: {sum(U.nbytes for U in factors):,} bytes")
    for name, P in (("before", start), ("backpropagation", exact), ("LANCE", lance)):
        print(f"accuracy {name}: {accuracy(P, test_x, test_labels):.1%}")


if __name__ == "__main__":
    main(*sys.argv[1:2])
