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


class Method:
    """
    Every other ascent and direction, on one flat vector; remembers VaSSO's and FSAM's average from update to update.

    `matrix` marks the coordinates of weights with two dimensions or more, `frozen` those that are never perturbed.
    """

    def __init__(self, perturbation="sam", direction="arc", scale="last", eta=0.01, phi=0.4, sigma=1.0, lam=0.9,
                 matrix=None, frozen=None):  # fmt: skip
        self.perturbation, self.direction, self.scale = perturbation, direction, scale
        self.eta, self.phi, self.sigma, self.lam, self.matrix, self.frozen = eta, phi, sigma, lam, matrix, frozen
        self.average = None

    def step(self, g, point, length):
        if self.perturbation == "asam":
            t = np.abs(point) + self.eta
            if self.matrix is not None:
                t[~self.matrix] = 1
            return length * t**2 * g / np.sqrt(np.sum((t * g) ** 2))
        climb = g
        if self.perturbation == "vasso":
            self.average = g if self.average is None else (1 - self.phi) * self.average + self.phi * g
            climb = self.average
        elif self.perturbation == "fsam":
            if self.average is None:
                self.average = g
            else:
                climb = g - self.sigma * self.average
                self.average = self.lam * self.average + (1 - self.lam) * g
        return length * climb / np.sqrt(np.sum(climb**2))

    def update(self, theta, loss, gradient, rho, k=1, alpha=1.0, rho_max=None):
        """What the base optimizer is given: the direction, of the wanted norm."""
        rho_max = 2 * rho if rho_max is None else rho_max
        free = np.ones(len(theta), bool) if self.frozen is None else ~self.frozen

        def length_of(v):
            return np.sqrt(np.sum(v[free] ** 2))

        point, gradients = np.array(theta, dtype=np.float64), []
        for _ in range(k):
            g = gradient(point)
            gradients.append(g)
            point = point + self.step(np.where(free, g, 0), point, rho / k)
        gradients.append(gradient(point))
        climbed = point - theta
        if self.direction == "arc":
            v0, v1 = climbed / length_of(climbed), np.where(free, gradients[-1], 0) / length_of(gradients[-1])
            if alpha is None:
                grid = np.linspace(0, 2, 21)
                alpha = grid[np.argmax([loss(theta + rho_max * rotate(v0, v1, a)) for a in grid])]
            v = rotate(v0, v1, alpha)
        else:
            taken = gradients if self.direction.endswith("+") else gradients[1:]
            weights = [1 / length_of(g) if self.direction.startswith("lsam") else 1.0 for g in taken]
            v = np.where(free, sum(w * g for w, g in zip(weights, taken, strict=True)), 0)
            v = v / length_of(v)
        sizes = [length_of(g) for g in gradients]
        if self.scale == "slope":
            size = (loss(point) - loss(theta)) / length_of(climbed)
        elif self.scale == "slope_max":
            size = (loss(theta + rho_max * v) - loss(theta)) / rho_max
        else:
            size = {"last": sizes[-1], "first": sizes[0], "mean": np.mean(sizes), "max": np.max(sizes)}[self.scale]
        return np.where(free, size * v, gradients[-1])


class Stale:
    """One pass an update, where the average of the updates before points: m ← β m + (1−β) g/‖g‖, from 0."""

    def __init__(self, decay=0.5, frozen=None):
        self.decay, self.frozen, self.average, self.alpha = decay, frozen, None, 1.0

    def update(self, theta, loss, gradient, rho, alpha=1.0, rho_max=0.0, search=False):
        """The direction, the loss of the only pass, and α after it (if none is given: 1, or where a search found the top)."""
        free = np.ones(len(theta), bool) if self.frozen is None else ~self.frozen
        m, point, searched = self.average, theta, alpha is None
        if m is not None:
            point = theta + rho * m / np.linalg.norm(m)
        g, seen = gradient(point), loss(point)
        moving = np.where(free, g, 0)
        size, direction = np.linalg.norm(moving), g
        unit = moving / size
        if m is not None:
            v0 = m / np.linalg.norm(m)
            if searched and search:
                grid = np.linspace(0, 2, 21)
                self.alpha = grid[np.argmax([loss(theta + rho_max * rotate(v0, unit, a)) for a in grid])]
            alpha = self.alpha if searched else alpha
            direction = np.where(free, size * rotate(v0, unit, alpha), g)
        self.average = (1 - self.decay) * unit + (0 if m is None else self.decay * m)
        return direction, seen, self.alpha if searched else alpha


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
