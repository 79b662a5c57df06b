"""Pretrained language models with levels (§7.3 of the paper): MLP blocks of a Hugging Face causal language
model become levels of a Continuum Memory System, their trained weights being what every context starts from.

The model is not changed. Weights that adapt are state, one set per row of the batch; `adapt` drives them.

Shapes: B batch, t tokens, V vocabulary; a fast weight is `[B, …]` with the shape of its parameter behind.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from nested_learning.extras import MissingExtraError
from nested_learning.layers.checks import check_held, check_kind, describe
from nested_learning.levels import LevelSpec, check_levels
from nested_learning.models.sampling import check_count, check_sampling, sample_token
from nested_learning.models.tokens import check_prompt, check_range, check_tokens
from nested_learning.state import State

MLP = re.compile(r"(?:^|\.)(\d+)\.mlp$")
LEVELS_FILE = "levels.json"


@dataclass(frozen=True)
class PretrainedMLPState(State):
    """Fast weights of one MLP block, in the order of its matrices.

    weights: what has been learned. chunk_size: of its level. active: what tokens read until the level's next
    update; None = `weights`.
    """

    weights: tuple[Tensor, ...]
    chunk_size: int
    active: tuple[Tensor, ...] | None = None


@dataclass(frozen=True)
class PretrainedState(State):
    """mlps: a state per adapted block, empty where all weights are the model's own. cache: keys and values
    `[B, heads, position, width]` of every layer. position: tokens read since the start of the context."""

    mlps: tuple[PretrainedMLPState, ...] = ()
    cache: tuple[tuple[Tensor, Tensor], ...] = ()
    position: int = 0


def levels_from_pretrained(hf_model: nn.Module, levels: Sequence[LevelSpec]) -> PretrainedLevels:
    """Put MLP blocks of a pretrained language model at levels.

    Args:
        hf_model: a Hugging Face causal language model whose decoder layers have an `mlp` of dense matrices:
            the Llama, Qwen, Gemma, Mistral and GPT-2 families. Not a mixture of experts.
        levels: `name`, `chunk_size` (tokens between two updates) and `layers` (numbers of decoder layers;
            only a single level may leave them out, and has all). A level without a `chunk_size` and layers
            at no level do not adapt.

    Raises:
        ValueError: a model without such blocks, or levels that do not fit it.

    Example:
        >>> model = levels_from_pretrained(hf_model, [LevelSpec(name="fast", chunk_size=64, layers=(10, 11))])
        >>> report, state = memorize(model, tokens)                   # nested_learning.adapt
        >>> text = model.generate(prompt, 100, restart(model, state))  # with what was learned
    """
    return PretrainedLevels(hf_model, levels)


class PretrainedLevels(nn.Module):
    """A Hugging Face language model as `logits, state = model(tokens, state)`; see `levels_from_pretrained`.

    `adapt` can drive it. Its path is "cms_plain": levels that learn from the loss of the language model only.
    Changes of a level are used from the first call that begins at or after the next multiple of its chunk
    size, so `AdaptConfig.chunk_size` should divide the chunk sizes. A level slower than that keeps two copies
    of its weights.
    """

    def __init__(self, hf_model: nn.Module, levels: Sequence[LevelSpec]) -> None:
        super().__init__()
        if not isinstance(hf_model, nn.Module):
            raise ValueError(f"hf_model must be a loaded model, got {describe(hf_model)}")
        blocks = mlp_blocks(hf_model)
        self.levels = _with_layers(levels, len(blocks))
        self.model = hf_model
        periods = {
            n: level.chunk_size for level in self.levels for n in level.layers or () if level.chunk_size
        }
        self.periods = [periods[n] for n in sorted(periods)]
        self._blocks = [blocks[n] for n in sorted(periods)]  # lists: they belong to `model` already
        self._layers = len(blocks)
        table: Any = hf_model.get_input_embeddings()  # type: ignore[operator]
        self._vocab = int(table.num_embeddings)
        self._originals = [copy.copy(block) for block in self._blocks]

    @property
    def max_length(self) -> int | None:
        """Tokens of a context that the model was made for, if its configuration says so."""
        model: Any = self.model
        length: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        return length

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that end a text, by the model's settings of generation."""
        model: Any = self.model
        ids: int | list[int] | None = model.generation_config.eos_token_id
        return () if ids is None else (ids,) if isinstance(ids, int) else tuple(ids)

    def init_state(self, batch: int, plain: bool = False) -> PretrainedState:
        """State at the start of a context; with `plain`, the weights of all levels are part of it."""
        check_count("batch", batch, 1)
        if not plain:
            return PretrainedState()
        pairs = zip(self._blocks, self.periods, strict=True)
        return PretrainedState(tuple(PretrainedMLPState(_rows(b, batch), period) for b, period in pairs))

    def fast_paths(self, state: PretrainedState) -> dict[str, list[str]]:
        """Names of the weights in `state` that can learn; see `adapt.fast_paths`."""
        names = [f"mlps.{i}.weights.{j}" for i, mlp in enumerate(state.mlps) for j in range(len(mlp.weights))]
        return {"cms_plain": names} if names else {}

    def forward(self, tokens: Tensor, state: PretrainedState | None = None) -> tuple[Tensor, PretrainedState]:
        """`tokens [B, t]` → (`logits [B, t, V]`, state). `state=None` starts a context.

        Raises:
            TypeError: tokens that are no integers.
            ValueError: tokens of another shape, or outside of the vocabulary (on the CPU); a state of another
                batch or model.
        """
        check_tokens(tokens)
        if tokens.device.type == "cpu":  # elsewhere the lookup asserts, and a check would make the host wait
            check_range(tokens, self._vocab)
        state = PretrainedState() if state is None else state
        self._check_state(state, tokens)
        used = [_in_use(mlp) for mlp in state.mlps]
        cache = _open_cache(state.cache)
        with self._fast(used):
            out = self.model(input_ids=tokens, past_key_values=cache, use_cache=True)
        position = state.position + tokens.shape[1]
        mlps = []
        for mlp, period in zip(state.mlps, self.periods if state.mlps else (), strict=True):
            due = position // period > state.position // period
            mlps.append(PretrainedMLPState(mlp.weights, period, None if due else mlp.active or mlp.weights))
        return out.logits, PretrainedState(tuple(mlps), _close_cache(out.past_key_values), position)

    def _check_state(self, state: PretrainedState, tokens: Tensor) -> None:
        check_kind(state, PretrainedState, "PretrainedLevels")
        if len(state.mlps) not in (0, len(self._blocks)):
            count = len(self._blocks)
            raise ValueError(
                f"state must hold the weights of {count} MLP blocks or none, got {len(state.mlps)}"
            )
        if len(state.cache) not in (0, self._layers):
            raise ValueError(f"state must be of {self._layers} decoder layers, got {len(state.cache)}")
        for keys, _ in state.cache:
            check_held(keys, keys.shape[1:], tokens, "PretrainedLevels")
        if not state.mlps:
            return
        for block, period, mlp in zip(self._blocks, self.periods, state.mlps, strict=True):
            check_kind(mlp, PretrainedMLPState, "PretrainedLevels")
            if mlp.chunk_size != period:
                raise ValueError(f"state must be of chunk size {period}, got {mlp.chunk_size}")
            matrices = [p for p in block.parameters() if p.dim() == 2]
            if len(matrices) != len(mlp.weights):
                raise ValueError(
                    f"state must hold {len(matrices)} matrices of a block, got {len(mlp.weights)}"
                )
            for own, held in zip(matrices, mlp.weights, strict=True):
                check_held(held, own.shape, tokens, "PretrainedLevels")

    @contextmanager
    def _fast(self, used: list[tuple[Tensor, ...]]) -> Iterator[None]:
        """Let the adapted blocks compute with weights of each row, for the time of one call."""
        try:
            for block, original, weights in (
                zip(self._blocks, self._originals, used, strict=True) if used else ()
            ):
                block.forward = _RowwiseMLP(original, weights)
            yield
        finally:
            for block in self._blocks:
                block.__dict__.pop("forward", None)

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        state: PretrainedState | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
    ) -> Tensor:
        """Continue `tokens [B, T]` by sampling: `[B, T + max_new_tokens]`.

        Args:
            state: of this model, with what it has learned and read before `tokens`; it is not changed.
            max_new_tokens, temperature, top_k, top_p, seed: as in `HopeLM.generate`, with its errors.
        """
        check_prompt(tokens, self._vocab)
        check_sampling(max_new_tokens, temperature, top_k, top_p, seed)
        generator = None if seed is None else torch.Generator(tokens.device).manual_seed(seed)
        new = tokens
        for _ in range(max_new_tokens):
            logits, state = self(new, state)
            new = sample_token(logits[:, -1].float(), temperature, top_k, top_p, generator)[:, None]
            tokens = torch.cat([tokens, new], 1)
        return tokens

    def save(self, folder: str | Path) -> None:
        """Write the model as `save_pretrained` does, and its levels beside it. A memory is saved by itself:
        `state.save(path)`, `load_state(path)`."""
        model: Any = self.model
        model.save_pretrained(folder)
        specs = [{"name": s.name, "chunk_size": s.chunk_size, "layers": s.layers} for s in self.levels]
        (Path(folder) / LEVELS_FILE).write_text(json.dumps(specs, indent=2), encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path, **options: Any) -> Self:
        """Read what `save` wrote; `options` go to `AutoModelForCausalLM.from_pretrained`.

        Raises:
            FileNotFoundError: there are no levels in `folder`.
            ValueError: they are no list of levels.
            MissingExtraError: transformers is not installed.
        """
        path = Path(folder) / LEVELS_FILE
        try:
            levels = [LevelSpec(**spec) for spec in json.loads(path.read_text(encoding="utf-8"))]
        except (json.JSONDecodeError, TypeError) as error:
            raise ValueError(f"{path} does not hold levels: {error}") from error
        model = _transformers().AutoModelForCausalLM.from_pretrained(folder, **options)
        return cls(model, levels)


class _RowwiseMLP:
    """`mlp(x [B, t, D])` with matrices `[B, …]`, in their precision."""

    def __init__(self, mlp: nn.Module, weights: tuple[Tensor, ...]) -> None:
        matrices = dict(zip(_matrices(mlp), weights, strict=True))
        wide = weights[0].dtype
        others = {n: p.to(wide) for n, p in mlp.named_parameters() if n not in matrices and p.dtype != wide}
        self.mlp, self.parameters, self.dtype = mlp, {**others, **matrices}, wide
        self.dims = {**dict.fromkeys(others), **dict.fromkeys(matrices, 0)}

    def __call__(self, x: Tensor) -> Tensor:
        def one_row(parameters: dict[str, Tensor], row: Tensor) -> Any:
            return functional_call(self.mlp, parameters, (row,))

        y: Tensor = vmap(one_row, in_dims=(self.dims, 0), randomness="different")(
            self.parameters, x.to(self.dtype)
        )
        return y.to(x.dtype)


def mlp_blocks(hf_model: nn.Module) -> dict[int, nn.Module]:
    """MLP blocks of a language model by the number of their decoder layer.

    Raises:
        ValueError: there are none, several for a layer, or they are no chain of dense matrices.
    """
    kind = type(hf_model).__name__
    blocks: dict[int, nn.Module] = {}
    for name, module in hf_model.named_modules():
        if found := MLP.search(name):
            number = int(found.group(1))
            if number in blocks:
                raise ValueError(
                    f"{kind} has several MLP blocks of layer {number}: it is no plain language model"
                )
            if any(p.dim() > 2 for p in module.parameters()) or "expert" in " ".join(_names(module)):
                raise ValueError(f"{kind} has experts in layer {number}; only dense MLP blocks can be levels")
            blocks[number] = module
    if not blocks:
        raise ValueError(
            f"{kind} has no MLP blocks called layers.N.mlp; Llama, Qwen, Gemma, Mistral and GPT-2 models have"
        )
    return blocks


def _names(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_modules()]


def _matrices(mlp: nn.Module) -> list[str]:
    return [name for name, p in mlp.named_parameters() if p.dim() == 2]


def _rows(mlp: nn.Module, batch: int) -> tuple[Tensor, ...]:
    """The matrices of a block for every row, in float32 at least; they share memory until one is changed."""
    found = [p for p in mlp.parameters() if p.dim() == 2]
    wide = [p.to(torch.promote_types(p.dtype, torch.float32)) for p in found]
    return tuple(p.expand(batch, *p.shape) for p in wide)


def _in_use(mlp: PretrainedMLPState) -> tuple[Tensor, ...]:
    """What tokens read. Between two updates of a level that is `active`, but gradients go to `weights`."""
    if mlp.active is None:
        return mlp.weights
    pairs = zip(mlp.active, mlp.weights, strict=True)
    return tuple(a + (w - w.detach()) if w.requires_grad else a for a, w in pairs)


def _with_layers(levels: Sequence[LevelSpec], count: int) -> list[LevelSpec]:
    """Levels with the numbers of their layers, checked."""
    check_levels(levels)
    made, taken = [], set[int]()
    for level in levels:
        plain = LevelSpec(name=level.name, chunk_size=level.chunk_size, layers=level.layers)
        if level != plain:
            raise ValueError(
                f"levels.{level.name} may set name, chunk_size and layers only: the rest is trained"
            )
        if level.layers is None and len(levels) > 1:
            raise ValueError(f"levels.{level.name}.layers must say which of the {count} layers it has")
        layers = tuple(range(count)) if level.layers is None else level.layers
        if wrong := [n for n in layers if n >= count]:
            raise ValueError(f"levels.{level.name}.layers must be below {count}, got {wrong[0]}")
        if twice := taken.intersection(layers):
            raise ValueError(f"layer {min(twice)} must be at one level only, not at {level.name} too")
        taken.update(layers)
        made.append(LevelSpec(name=level.name, chunk_size=level.chunk_size, layers=layers))
    return made


def _open_cache(cache: tuple[tuple[Tensor, Tensor], ...]) -> Any:
    """Keys and values as transformers wants them. It keeps all of them, also for layers with a window."""
    opened = _transformers().DynamicCache()
    for layer, (keys, values) in enumerate(cache):
        opened.update(keys, values, layer)
    return opened


def _close_cache(cache: Any) -> tuple[tuple[Tensor, Tensor], ...]:
    return tuple((layer.keys, layer.values) for layer in cache.layers)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError("pretrained models", "transformers") from error
    return transformers
