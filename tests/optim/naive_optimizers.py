"""The optimizers once more, in NumPy and float64, one matrix at a time, written from the equations."""

from __future__ import annotations

import numpy as np

COEFFICIENTS = {"quintic": (3.4445, -4.7750, 2.0315), "cubic": (1.5, -0.5, 0.0)}


def newton_schulz(g, steps=5, polynomial="quintic"):
    a, b, c = COEFFICIENTS[polynomial]
    x = g / max(np.sqrt((g**2).sum()), 1e-7)
    for _ in range(steps):
        x = a * x + b * (x @ x.T @ x) + c * (x @ x.T @ x @ x.T @ x)
    return x


def m3(w, grads, lr, o, decay=0.0):
    """Algorithm 1 with all gradients at hand: sums over blocks are written as sums over blocks."""
    b1, b2, b3 = o.betas
    ema, f = o.accumulation == "ema", o.slow_every
    w, m1, m2, v = w.copy(), 0 * w, 0 * w, 0 * w
    slow = 0 * w
    for t, g in enumerate(grads):
        if t and t % f == 0:
            block = sum(grads[t - f : t])
            m2 = b3 * m2 + (1 - b3) * block if ema else m2 + b3 * block
            slow = newton_schulz(m2, o.ns_steps, o.polynomial)
        m1 = b1 * m1 + (1 - b1) * g if ema else m1 + b1 * g
        v = b2 * v + (1 - b2) * g**2 if ema else v + b2 * g**2
        fast = (1 - b1) * g + b1 * m1 if o.nesterov else m1
        step = newton_schulz(fast, o.ns_steps, o.polynomial) + o.slow_weight * slow
        if o.second_moment:
            step = step / (np.sqrt(v + o.eps) if o.eps_inside else np.sqrt(v) + o.eps)
        rows, columns = w.shape
        scale = {
            "none": 1.0,
            "original": np.sqrt(max(1, rows / columns)),
            "match_rms_adamw": 0.2 * np.sqrt(max(rows, columns)),
            "rms": 0.2 / np.sqrt((step**2).mean()),
        }[o.adjust]
        w = (1 - lr * decay) * w - lr * scale * step
    return w


def delta_momentum(w, grads, lr, o):
    """Eqs. 46–52 on one matrix."""
    w, m, second = w.copy(), 0 * w, 0 * w
    for t, g in enumerate(grads, start=1):
        c = {
            "off": 0.0,
            "literal": 1.0,
            "eta": lr,
            "normalized": o.beta / (g**2).sum(),
            "capped": min(lr, o.momentum / (g**2).sum()),
        }[o.delta]
        if o.side == "right":
            m = m @ (o.momentum * np.eye(g.shape[1]) - c * g.T @ g)
        else:
            m = (o.momentum * np.eye(g.shape[0]) - c * g @ g.T) @ m
        phi = {
            "identity": g,
            "signed_square": np.sign(g) * g**2,
            "cube": g**3,
            "sign": np.sign(g),
            "tanh": np.tanh(g),
        }[o.features]
        if o.precondition == "diagonal":
            second = o.beta2 * second + (1 - o.beta2) * g**2
            phi = phi / (np.sqrt(second / (1 - o.beta2**t)) + o.eps)
        m = m - lr * phi
        w = w + {"identity": m, "sign": lr * np.sign(m), "newton_schulz": lr * newton_schulz(m)}[o.output]
    return w


def proximal(w, inputs, targets, lr):
    """argmin_W mean ½‖W x − u‖² + ‖W − W_t‖²/(2η), as one least-squares problem of stacked rows."""
    n, d = inputs.shape
    rows = np.concatenate([inputs / np.sqrt(n), np.eye(d) / np.sqrt(lr)])
    right = np.concatenate([targets / np.sqrt(n), w.T / np.sqrt(lr)])
    return np.linalg.lstsq(rows, right, rcond=None)[0].T
