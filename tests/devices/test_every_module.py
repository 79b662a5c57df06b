"""Every module that computes with tensors is tried on fake CUDA tensors, or it says here why it is not."""

from __future__ import annotations

import ast
from fnmatch import fnmatch
from pathlib import Path

import nested_learning

SOURCE = Path(nested_learning.__file__).parent
HERE = Path(__file__).parent
PACKAGE = "nested_learning."

THROUGH = {
    "data.synthetic.needle": "reproduce.needle",
    "layers.checks": "layers.attention",
    "layers.streams": "layers.linear",
    "ops.cms.chunk": "layers.cms",
    "ops.delta_rule.chunk": "layers.linear",
    "ops.memory_mlp.chunk": "layers.cms",
    "ops.scan": "layers.linear",
    "ops.self_modifying.chunk": "layers.self_modifying",
    "ops.self_modifying_linear.chunk": "layers.self_modifying_linear",
    "ops.unit": "layers.linear",
    "optim.base": "optim.build",
    "optim.capture": "optim.delta_gd",
    "optim.deep_momentum": "optim.build",
    "optim.delta_momentum": "optim.build",
    "optim.learned_rates": "optim.per_level",
    "optim.m3": "optim.build",
    "optim.multi_frequency": "optim.build",
    "optim.wrapper": "optim.build",
    "state": "layers.attention",
}
"""Modules that no test here imports, and the imported module that they are tried through."""

FILES = "reads and writes files on the host; tests/train tests it"
GROUP = "needs a group of processes; test_strategies_name_their_device.py and tests/distributed test it"
COMMAND = "a command line; its parts are tried"
HOST = "draws data on the host; a loop moves the batches"
COUNTS = 'counts without data, on the device "meta"'
LOOP = "trains by train.plain_loop, which moves models and batches; evaluates through what is tried"
CARD = "measures a card; its tests let torch believe in one"
GRAPHS = "CUDA graphs need a card; its tests replace the capture"
EXEMPT = {
    "bench.*": CARD,
    "chat": "hands texts to models.generation and adapt, which are tried; tells losses on the host",
    "commands.*": COMMAND,
    "data.synthetic.formal": HOST,
    "data.synthetic.mad": HOST,
    "data.synthetic.parity": HOST,
    "data.synthetic.recall": HOST,
    "eval.fit": COUNTS,
    "eval.lm": "hands requests of lm-eval to eval.scorer, which is tried",
    "eval.results": FILES,
    "eval.second_reading": "eval.reader, which is tried, on two texts",
    "eval.segments": FILES,
    "eval.zeroshot": "eval.scorer and eval.arms, which are tried, on questions",
    "graphs": GRAPHS,
    "hf.model": "hands tokens and states to models.lm, which is tried",
    "inspection.*": "reads results on the host; what it calls of layers is tried. It has not run on a card",
    "models.bill": COUNTS,
    "models.compile": "marks modules; tests/models/test_compile.py compiles them",
    "models.decode": GRAPHS,
    "ops.kernels": "chooses by the name of a device; tests/bench/test_card.py has every choice",
    "ops.*.triton": "Triton's kernels need data; tests/kernels interprets and compiles them",
    "ops.tiles": "Triton's kernels need data; tests/kernels interprets and compiles them",
    "reproduce.byte_*": COMMAND,
    "reproduce.digits": LOOP,
    "reproduce.fig4": "a simulation on the host",
    "reproduce.levels": LOOP,
    "reproduce.mad": LOOP,
    "reproduce.memorize": LOOP,
    "reproduce.orthogonal": "a simulation on the host",
    "reproduce.runner": "starts processes",
    "runtime": "names devices; tests/test_runtime.py has machines of all kinds",
    "torchrun": COMMAND,
    "train.audit": LOOP,
    "train.captured": GRAPHS,
    "train.checkpoint.*": FILES,
    "train.checkpointer": FILES,
    "train.launch": "builds a run from files; its parts are tried",
    "train.origin": FILES,
    "train.plain_loop": GRAPHS,
    "train.plan": COUNTS,
    "train.starts": "asks for the name of a card",
    "train.strategy.ddp": GROUP,
    "train.strategy.deepspeed": GROUP,
    "train.strategy.distributed": GROUP,
    "train.strategy.fsdp": GROUP,
    "train.trainer": "the loop; what it calls is tried",
    "train.trial": GROUP,
}
"""Modules, or patterns of them, that no fake tensor goes through, and why."""


def imports(path: Path) -> set[str]:
    """Modules that a file imports from, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module} | {f"{node.module}.{name.name}" for name in node.names}
    return found


def own(path: Path) -> set[str]:
    """Modules of the package that a file imports from, without its name."""
    return {name.removeprefix(PACKAGE) for name in imports(path) if name.startswith(PACKAGE)}


def name_of(path: Path) -> str:
    """The name of a module without that of the package."""
    return path.relative_to(SOURCE).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")


FILES_OF = {name_of(path): path for path in SOURCE.rglob("*.py")}
WITH_TENSORS = {
    name for name, path in FILES_OF.items() if any(m.split(".")[0] == "torch" for m in imports(path))
}
TRIED = WITH_TENSORS & {
    name
    for path in (*HERE.glob("test_fake_*.py"), HERE / "stand_in_card.py", HERE / "on_cuda.py")
    for name in own(path)
}


def exempt(name: str) -> bool:
    """Whether a line of `EXEMPT` covers a module."""
    return any(fnmatch(name, pattern) for pattern in EXEMPT)


def test_every_module_is_tried_or_exempt() -> None:
    missing = [name for name in WITH_TENSORS - TRIED - THROUGH.keys() if not exempt(name)]
    assert sorted(missing) == [], "try them in tests/devices, or say in EXEMPT why that cannot be"


def test_what_is_tried_through_another_module_is_imported_there() -> None:
    for name, user in THROUGH.items():
        assert name not in TRIED and not exempt(name), f"{name} needs no line in THROUGH"
        assert user in TRIED and name in own(FILES_OF[user]), f"{name} is not tried through {user}"


def test_what_is_tried_needs_no_exemption() -> None:
    """Patterns are for packages; a line for one module must be of one that no test tries."""
    assert sorted(name for name in EXEMPT.keys() & TRIED) == []


def test_a_module_that_nobody_tries_would_be_found() -> None:
    assert "layers.attention" in TRIED and "optim.m3" in WITH_TENSORS
    assert not exempt("layers.new") and exempt("train.checkpoint.tensors")
