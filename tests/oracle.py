"""
XSAM once more, independently: one flat float64 vector, NumPy, the paper's formulas as they stand, no import of ours.

It is given `loss(theta) -> float` and `gradient(theta) -> vector` and knows nothing of frameworks. Slow and obvious.
"""

import numpy as np


def xsam_direction(theta, loss, gradient, rho, k=1, alpha=None, rho_max=None, alpha_max=2.0, samples=21):
    """Returns (‖g_k‖ v(α), α, the search's losses or None): Eq. 5-8 and the k ascent steps of §2.1."""
    theta = np.asarray(theta, dtype=np.float64)
    rho_max = 2 * rho if rho_max is None else rho_max
    point = theta.copy()
    for _ in range(k):
        g = gradient(point)
        point = point + rho / k * g / np.sqrt(np.sum(g**2))
    g = gradient(point)
    v0 = (point - theta) / np.sqrt(np.sum((point - theta) ** 2))
    v1 = g / np.sqrt(np.sum(g**2))
    losses = None
    if alpha is None:
        grid = np.linspace(0.0, alpha_max, samples)
        losses = np.array([loss(theta + rho_max * rotate(v0, v1, a)) for a in grid])
        alpha = grid[np.argmax(losses)]
    return np.sqrt(np.sum(g**2)) * rotate(v0, v1, alpha), alpha, losses


def rotate(v0, v1, alpha):
    """Turns v0 by α times its angle to v1 within their plane: Gram-Schmidt instead of the paper's slerp formula."""
    sideways = v1 - np.dot(v0, v1) * v0
    length = np.sqrt(np.sum(sideways**2))
    if length < 1e-14:
        return v0
    psi = np.arctan2(length, np.dot(v0, v1))
    return np.cos(alpha * psi) * v0 + np.sin(alpha * psi) * sideways / length


class SGD:
    def __init__(self, lr, momentum=0.0):
        self.lr, self.momentum, self.velocity = lr, momentum, None

    def step(self, theta, g):
        self.velocity = g if self.velocity is None else self.momentum * self.velocity + g
        return theta - self.lr * self.velocity


class AdamW:
    """Loshchilov & Hutter 2019, Algorithm 2, with bias correction."""

    def __init__(self, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.m, self.v, self.t = 0.0, 0.0, 0

    def step(self, theta, g):
        b1, b2 = self.betas
        self.t += 1
        self.m = b1 * self.m + (1 - b1) * g
        self.v = b2 * self.v + (1 - b2) * g**2
        m, v = self.m / (1 - b1**self.t), self.v / (1 - b2**self.t)
        return theta * (1 - self.lr * self.weight_decay) - self.lr * m / (np.sqrt(v) + self.eps)


class TanhNetwork:
    """softmax(W2 tanh(W1 x + b1) + b2) with cross-entropy; θ = (W1, b1, W2, b2), row by row; the gradient by hand."""

    def __init__(self, inputs, hidden, classes):
        self.shapes = [(hidden, inputs), (hidden,), (classes, hidden), (classes,)]

    def unpack(self, theta):
        parts = np.split(theta, np.cumsum([int(np.prod(shape)) for shape in self.shapes])[:-1])
        return [part.reshape(shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def forward(self, theta, x):
        w1, b1, w2, b2 = self.unpack(theta)
        hidden = np.tanh(x @ w1.T + b1)
        logits = hidden @ w2.T + b2
        shifted = logits - logits.max(axis=1, keepdims=True)
        return hidden, shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))

    def loss(self, theta, x, y):
        return -self.forward(theta, x)[1][np.arange(len(y)), y].mean()

    def gradient(self, theta, x, y):
        w2 = self.unpack(theta)[2]
        hidden, log_p = self.forward(theta, x)
        d_logits = np.exp(log_p)
        d_logits[np.arange(len(y)), y] -= 1
        d_logits /= len(y)
        d_hidden = d_logits @ w2 * (1 - hidden**2)
        parts = [d_hidden.T @ x, d_hidden.sum(0), d_logits.T @ hidden, d_logits.sum(0)]
        return np.concatenate([part.reshape(-1) for part in parts])


def train(network, theta, batches, optimizer, epochs, rho, **method):
    """Full training: `alpha=None` is searched at the first batch of every epoch and kept. Returns θ and each search's α."""
    alpha, found = method.pop("alpha", None), []
    for _ in range(epochs):
        for i, (x, y) in enumerate(batches):
            search = alpha is None and i == 0
            direction, used, _ = xsam_direction(
                theta,
                lambda t, x=x, y=y: network.loss(t, x, y),
                lambda t, x=x, y=y: network.gradient(t, x, y),
                rho,
                alpha=None if search else (found[-1] if alpha is None else alpha),
                **method,
            )
            if search:
                found.append(used)
            theta = optimizer.step(theta, direction)
    return theta, found
