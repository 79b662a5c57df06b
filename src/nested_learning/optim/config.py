"""Options of the optimizers, each with its default and its checks.

The optimizers take these fields as keyword arguments. `OptimConfig` is the `optim` section of a configuration
and holds the options of every optimizer that a configuration can name.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass

from nested_learning.checks import at_least, check_types, one_of, positive, within

POLYNOMIALS = ("quintic", "cubic")
DTYPES = ("bfloat16", "float32", "param")


@dataclass(kw_only=True, slots=True)
class MuonConfig:
    """Options of `torch.optim.Muon`, whose steps are scaled to the root mean square of AdamW's.

    Args:
        momentum, nesterov: of the momentum.
        ns_steps: Newton–Schulz iterations.
    """

    momentum: float = 0.95
    nesterov: bool = True
    ns_steps: int = 5

    def __post_init__(self) -> None:
        check_types(self, "muon")
        within("muon.momentum", self.momentum, "[0, 1)")
        at_least("muon.ns_steps", self.ns_steps, 1)


@dataclass(kw_only=True, slots=True)
class M3Config:
    """Options of `M3` (Algorithm 1). Where the paper leaves a choice, the other reading is a switch.

    Args:
        betas: β₁ of the fast momentum, β₂ of the second moment, β₃ of the slow momentum.
        slow_weight: α, weight of the slow memory in the step. 0 leaves it out and keeps no state for it;
            a negative weight is the minus sign of Eq. 75 taken literally.
        slow_every: f, steps between two updates of the slow memory, and of its Newton–Schulz.
        accumulation: "ema", M ← βM + (1 − β)g, or "sum", M ← M + βg, as Algorithm 1 prints it (the
            second moment likewise).
        second_moment: divide the step by √V.
        eps: added to V.
        eps_inside: √(V + ε) of Algorithm 1; False = √V + ε.
        nesterov: orthogonalise (1 − β₁)g + β₁M instead of M, as Muon does by default ("ema" only).
        ns_steps: T, Newton–Schulz iterations.
        polynomial: "quintic" (Muon's) or "cubic".
        ns_dtype: of the Newton–Schulz products: "bfloat16" (as in torch's Muon), "float32", or "param".
        adjust: scale of a matrix's step before the learning rate: "rms", its root mean square made 0.2
            (about AdamW's); "match_rms_adamw" and "original" as in torch's Muon; "none", as printed.
        adamw: this group is for AdamW, matrices included.
        adamw_betas, adamw_eps: of AdamW, which updates every parameter that is not a matrix.
    """

    betas: tuple[float, float, float] = (0.95, 0.95, 0.9)
    slow_weight: float = 0.5
    slow_every: int = 16
    accumulation: str = "ema"
    second_moment: bool = True
    eps: float = 1e-8
    eps_inside: bool = True
    nesterov: bool = False
    ns_steps: int = 5
    polynomial: str = "quintic"
    ns_dtype: str = "bfloat16"
    adjust: str = "rms"
    adamw: bool = False
    adamw_betas: tuple[float, float] = (0.9, 0.95)
    adamw_eps: float = 1e-8

    def __post_init__(self) -> None:
        check_types(self, "m3")
        for beta in self.betas:
            within("m3.betas", beta, "[0, 1)" if self.accumulation == "ema" else "[0, 1]")
        for beta in self.adamw_betas:
            within("m3.adamw_betas", beta, "[0, 1)")
        positive("m3.adamw_eps", self.adamw_eps)
        at_least("m3.slow_every", self.slow_every, 1)
        at_least("m3.ns_steps", self.ns_steps, 1)
        positive("m3.eps", self.eps)
        one_of("m3.accumulation", self.accumulation, ("ema", "sum"))
        one_of("m3.polynomial", self.polynomial, POLYNOMIALS)
        one_of("m3.ns_dtype", self.ns_dtype, DTYPES)
        one_of("m3.adjust", self.adjust, ("rms", "match_rms_adamw", "original", "none"))
        if self.nesterov and self.accumulation == "sum":
            raise ValueError("m3.nesterov needs m3.accumulation = ema, got 'sum'")


@dataclass(kw_only=True, slots=True)
class DGDConfig:
    """Options of `DeltaGradientDescent` (Eqs. 56–57).

    Args:
        step: "exact", the minimum of Eq. 56, (W − ηG)(I + ηS)⁻¹; or "paper", W(I − η′S) − η′G with
            η′ = η/(1 + η), which is the minimum for one input of norm 1 only.
        target: what W x learns: "gradient", u = −∂L/∂y (Eq. 56), or "relative", u = W_t x − ∂L/∂y. The
            former pulls W to zero along the inputs, so training ends where G = −W S and not at a minimum
            of the loss. With the latter the step is −ηG(I + ηS)⁻¹, which vanishes with the gradient.
        reduction: how the loss reduces its rows, "mean" or "sum"; S follows.
    """

    step: str = "exact"
    target: str = "gradient"
    reduction: str = "mean"

    def __post_init__(self) -> None:
        check_types(self, "dgd")
        one_of("dgd.step", self.step, ("exact", "paper"))
        one_of("dgd.target", self.target, ("gradient", "relative"))
        one_of("dgd.reduction", self.reduction, ("mean", "sum"))


@dataclass(kw_only=True, slots=True)
class GeneralizedConfig:
    """Options of `GeneralizedGradientDescent` (Eq. 59).

    Args:
        objective: "dot", "l2" or "huber".
        inner_steps: gradient steps towards the minimum of the objective.
    """

    objective: str = "huber"
    inner_steps: int = 5

    def __post_init__(self) -> None:
        check_types(self, "generalized")
        one_of("generalized.objective", self.objective, ("dot", "l2", "huber"))
        at_least("generalized.inner_steps", self.inner_steps, 1)


@dataclass(kw_only=True, slots=True)
class DeltaMomentumConfig:
    """Options of `DeltaMomentum` (Eqs. 46–49, 51–52).

    Args:
        momentum: α.
        delta: the coefficient c of the decay term m(αI − c gᵀg): "literal" (1, Eq. 49), "eta" (the
            learning rate), "normalized" (`beta`/‖g‖²), "capped" (the learning rate, at most α/‖g‖²), or
            "off" (plain momentum).
        side: "right", m gᵀg, or "left", ggᵀ m.
        beta: strength of "normalized".
        precondition: P of Eq. 47: "none" or "diagonal" (1/(√v + ε), v the second moment).
        features: φ of Eq. 51: "identity", "signed_square" (g|g|), "cube", "sign" or "tanh".
        output: σ of Eq. 52: "identity", "newton_schulz" or "sign". The latter two have no scale, so the
            learning rate multiplies them.
        beta2, eps: of the second moment.
    """

    momentum: float = 0.9
    delta: str = "capped"
    side: str = "right"
    beta: float = 0.5
    precondition: str = "none"
    features: str = "identity"
    output: str = "identity"
    beta2: float = 0.99
    eps: float = 1e-8

    def __post_init__(self) -> None:
        check_types(self, "delta_momentum")
        within("delta_momentum.momentum", self.momentum, "[0, 1]")
        within("delta_momentum.beta2", self.beta2, "[0, 1)")
        positive("delta_momentum.beta", self.beta)
        positive("delta_momentum.eps", self.eps)
        deltas = ("off", "literal", "eta", "normalized", "capped")
        one_of("delta_momentum.delta", self.delta, deltas)
        one_of("delta_momentum.side", self.side, ("right", "left"))
        one_of("delta_momentum.precondition", self.precondition, ("none", "diagonal"))
        features = ("identity", "signed_square", "cube", "sign", "tanh")
        one_of("delta_momentum.features", self.features, features)
        one_of("delta_momentum.output", self.output, ("identity", "newton_schulz", "sign"))


@dataclass(kw_only=True, slots=True)
class DeepMomentumConfig:
    """Options of `DeepMomentum` (Eqs. 50, 52).

    Args:
        decay: α, what is left of the memory after a step; it falls back to its initial weights.
        inner_lr: step size of the memory's own gradient descent.
        hidden: hidden width of the memory; 0 leaves its bias alone, which is plain momentum.
        objective: what the memory learns from the gradient g: "l2", ½‖M(u) + g‖², or "dot", ⟨M(u), g⟩.
        output: σ of Eq. 52: "identity" or "newton_schulz".
        seed: of the memory's initial weights.
    """

    decay: float = 0.9
    inner_lr: float = 1.0
    hidden: int = 16
    objective: str = "dot"
    output: str = "identity"
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(self, "deep_momentum")
        within("deep_momentum.decay", self.decay, "[0, 1]")
        positive("deep_momentum.inner_lr", self.inner_lr)
        at_least("deep_momentum.hidden", self.hidden, 0)
        within("deep_momentum.seed", self.seed, f"[0, {2**63})")
        one_of("deep_momentum.objective", self.objective, ("l2", "dot"))
        one_of("deep_momentum.output", self.output, ("identity", "newton_schulz"))


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """Optimizer and schedule of the outer loop.

    Args:
        name: "adamw", "sgd", or a rule for matrices: "muon", "m3", "dgd", "delta_momentum" or
            "deep_momentum". With a rule for matrices, AdamW updates every parameter that is not a matrix (see
            `optim.build`).
        lr: highest learning rate.
        betas, eps: of AdamW.
        adamw_lr_scale: with a rule for matrices, the learning rate of AdamW is `adamw_lr_scale * lr`.
        momentum: of "sgd".
        muon, m3, dgd, delta_momentum, deep_momentum: options of the rule of that name.
        weight_decay: on matrices and heads only (see `optim.param_groups`).
        clip_norm: limit of the global norm of the gradient; None = no limit.
        schedule: "cosine" (to `min_lr_ratio * lr` at the last step) or "constant", after the warm-up.
        warmup_steps: steps of linear warm-up.
        min_lr_ratio: last learning rate over the highest.
    """

    name: str = "adamw"
    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    adamw_lr_scale: float = 1.0
    momentum: float = 0.9
    muon: MuonConfig = field(default_factory=MuonConfig)
    m3: M3Config = field(default_factory=M3Config)
    dgd: DGDConfig = field(default_factory=DGDConfig)
    delta_momentum: DeltaMomentumConfig = field(default_factory=DeltaMomentumConfig)
    deep_momentum: DeepMomentumConfig = field(default_factory=DeepMomentumConfig)
    weight_decay: float = 0.1
    clip_norm: float | None = 1.0
    schedule: str = "cosine"
    warmup_steps: int = 20
    min_lr_ratio: float = 0.1

    def __post_init__(self) -> None:
        check_types(self, "optim")
        rules = [f.name for f in fields(self) if is_dataclass(getattr(self, f.name))]
        one_of("optim.name", self.name, ("adamw", "sgd", *rules))
        one_of("optim.schedule", self.schedule, ("cosine", "constant"))
        for name in ("lr", "eps", "adamw_lr_scale", "clip_norm"):
            positive(f"optim.{name}", getattr(self, name))
        for name in ("weight_decay", "warmup_steps"):
            at_least(f"optim.{name}", getattr(self, name), 0)
        for beta in self.betas:
            within("optim.betas", beta, "[0, 1)")
        within("optim.momentum", self.momentum, "[0, 1)")
        within("optim.min_lr_ratio", self.min_lr_ratio, "[0, 1]")
