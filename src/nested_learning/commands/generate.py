"""Continue texts with a checkpoint.

uv run nl generate outputs/pilot_smoke --prompt "Call me" --max-new-tokens 60
uv run nl generate outputs/pilot_smoke --prompt "It was" "She was" --json
uv run nl generate outputs/pilot_smoke --prompt-file book.txt --save-state book.pt
uv run nl generate outputs/pilot_smoke --state book.pt --prompt "And then"

One prompt is shown as it is continued. Several are continued as one batch, each as if alone, the i-th with
seed + i.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from nested_learning.command import Parser
from nested_learning.commands.sampling import add_sampling_options, sampler_from

if TYPE_CHECKING:
    from nested_learning.eval.loading import Loaded
    from nested_learning.state import ModelState


def parser() -> Parser:
    """The options of `nl generate`."""
    made = Parser(description=__doc__)
    add_sampling_options(made, 100)
    add = made.add_argument
    add("--prompt", nargs="+", default=[], metavar="TEXT", help="one text or several")
    add("--prompt-file", type=Path, metavar="FILE", help="a text from a file, after those of --prompt")
    add("--state", type=Path, metavar="FILE", help="go on from a memory that was saved")
    add("--save-state", type=Path, metavar="FILE", help="save the memory after the only text")
    add("--json", action="store_true", help="print a line of JSON for each text, at the end")
    return made


def main() -> None:
    """Continue the prompts and print them."""
    options = parser().parse_args()
    prompts = list(options.prompt)
    if options.prompt_file is not None:
        prompts.append(options.prompt_file.read_text(encoding="utf-8"))
    prompts = prompts or [""]
    if len(prompts) > 1 and (options.state or options.save_state):
        raise ValueError(f"--state and --save-state need one prompt, got {len(prompts)}")
    from nested_learning.eval.loading import load
    from nested_learning.state import load_state

    loaded = load(options.checkpoint, device=options.device)
    state = None if options.state is None else load_state(options.state, loaded.device)
    if len(prompts) == 1:
        one(loaded, prompts[0], state, options)
    else:
        several(loaded, prompts, options)


def one(loaded: Loaded, prompt: str, state: ModelState | None, options: argparse.Namespace) -> None:
    """Show a text while it comes."""
    stream = loaded.model.stream(
        prompt, loaded.tokenizer, stop=options.stop, state=state, **sampler_from(options)
    )
    if options.json:
        for _ in stream:
            pass
        print(json.dumps({"prompt": prompt, "text": stream.text, "end": stream.end}, ensure_ascii=False))
    else:
        print(prompt, end="", flush=True)
        for piece in stream:
            print(piece, end="", flush=True)
        print()
    if options.save_state is not None:
        stream.state().save(options.save_state)


def several(loaded: Loaded, prompts: list[str], options: argparse.Namespace) -> None:
    """Print texts that were continued as one batch."""
    texts = loaded.model.generate_text(prompts, loaded.tokenizer, stop=options.stop, **sampler_from(options))
    for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        if options.json:
            print(json.dumps({"prompt": prompt, "text": text}, ensure_ascii=False))
        else:
            print(f"--- {number + 1} ---\n{prompt}{text}")
