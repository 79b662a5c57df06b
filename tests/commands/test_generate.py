"""`nl generate` and `nl chat`, as somebody types them."""

from __future__ import annotations

import io
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from nested_learning.commands import nl
from nested_learning.commands.chat import Terminal
from nested_learning.eval.loading import Loaded
from nested_learning.models.sampling import Sampler


def run(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert nl.main(list(words)) == 0
    return capsys.readouterr().out


def test_one_prompt_is_continued(exported: Path, loaded: Loaded, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(capsys, "generate", str(exported), "--prompt", "The dog", "--max-new-tokens", "12")
    (text,) = loaded.model.generate_text(
        ["The dog"], loaded.tokenizer, max_new_tokens=12, temperature=0.8, top_k=40, seed=0
    )
    assert found == f"The dog{text}\n"


def test_several_prompts_and_json(exported: Path, loaded: Loaded, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--temperature", "0", "--top-k", "0", "--max-new-tokens", "9"]
    found = run(capsys, "generate", str(exported), "--prompt", "The", "How many dogs", "--json", *options)
    lines = [json.loads(line) for line in found.splitlines()]
    texts = loaded.model.generate_text(
        ["The", "How many dogs"], loaded.tokenizer, max_new_tokens=9, temperature=0
    )
    assert lines == [
        {"prompt": prompt, "text": text} for prompt, text in zip(["The", "How many dogs"], texts, strict=True)
    ]
    plain = run(capsys, "generate", str(exported), "--prompt", "The", "How many dogs", *options)
    assert plain == f"--- 1 ---\nThe{texts[0]}\n--- 2 ---\nHow many dogs{texts[1]}\n"


def test_a_memory_goes_from_one_command_to_the_next(
    exported: Path, loaded: Loaded, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "book.txt").write_text("The quick brown fox")
    memory = str(tmp_path / "book.pt")
    given = ["--temperature", "0", "--max-new-tokens"]
    file = str(tmp_path / "book.txt")
    first = run(capsys, "generate", str(exported), "--prompt-file", file, *given, "5", "--save-state", memory)
    more = run(
        capsys, "generate", str(exported), "--state", memory, "--prompt", " dog", *given, "6", "--json"
    )
    text = first[:-1] + " dog"
    assert json.loads(more)["text"] == "".join(
        loaded.model.stream(text, loaded.tokenizer, max_new_tokens=6, temperature=0)
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt", "a", "b", "--save-state", "x.pt"], "need one prompt, got 2"),
        (["--prompt", "a", "--state", "no.pt"], "no state file no.pt"),
        (["--prompt", "a", "--temperature", "-1"], "temperature must be at least 0"),
        (["--prompt-file", "no.txt"], "no.txt: No such file or directory"),
        (["--promt", "a"], "did you mean --prompt"),
    ],
)
def test_mistakes(words: list[str], message: str, exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert nl.main(["generate", str(exported), *words]) == 2
    assert message in capsys.readouterr().err


def talk(loaded: Loaded, *lines: str) -> str:
    from nested_learning.chat import Chat

    shown = io.StringIO()
    chat = Chat(loaded.model, loaded.tokenizer, Sampler(max_new_tokens=5, temperature=0))
    Terminal(chat, lambda text: shown.write(text) and None).run(lines)
    return shown.getvalue()


def test_a_conversation(loaded: Loaded, tmp_path: Path) -> None:
    book, memory = tmp_path / "book.txt", tmp_path / "m.pt"
    book.write_text("The quick brown fox jumps over the lazy dog.")
    lines = f"/remember {book}", "The", f"/save {memory}", "/forget", "/diff", f"/load {memory}", "/quit", "x"
    shown = talk(loaded, *lines)
    (answer,) = loaded.model.generate_text(
        [book.read_text() + "The"], loaded.tokenizer, max_new_tokens=5, temperature=0
    )
    first, rest = shown.split("\n", 1)
    assert first.startswith("read 44 of 44 tokens, ") and "in a second reading " in first
    assert rest.startswith(f"{answer}\nmemory in {memory}, ")
    assert "the memory is fresh\n| from a fresh memory" in rest
    assert rest.endswith(f"memory of {44 + 3 + 5} tokens\n")


def test_mistakes_are_told_and_the_talk_goes_on(loaded: Loaded, tmp_path: Path) -> None:
    shown = talk(
        loaded, "/remembr x", "/save", "/remember no.txt", "/surprise a", "/surprise ab", "", "/help"
    )
    for told in (
        "unknown command /remembr; did you mean /remember?",
        "/save needs a file",
        "no.txt: No such file or directory",
        "one token",
        "nats per token",
        "/remember FILE    read a file",
    ):
        assert told in shown


def test_lines_of_one_talk_are_lines_in_the_memory(loaded: Loaded) -> None:
    shown = talk(loaded, "The", "dog")
    first, *_ = loaded.model.generate_text(["The"], loaded.tokenizer, max_new_tokens=5, temperature=0)
    between = "" if first.endswith("\n") else "\n"
    (second,) = loaded.model.generate_text(
        [f"The{first}{between}dog"], loaded.tokenizer, max_new_tokens=5, temperature=0
    )
    assert shown == f"{first}\n{second}\n"


@pytest.mark.thorough
def test_the_command_talks_in_a_terminal(exported: Path, tmp_path: Path) -> None:
    """A line typed into a pseudo terminal is answered."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "nested_learning.commands.nl", "chat", str(exported), "--device", "cpu"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=tmp_path,
        env={**os.environ, "TERM": "dumb"},
    )
    os.close(theirs)
    os.write(ours, b"The dog\n/diff\n/quit\n")
    shown = b""
    try:
        while piece := os.read(ours, 4096):
            shown += piece
    except OSError:  # Linux: the other side is closed
        pass
    assert process.wait(60) == 0
    assert b"/help for what else there is" in shown and b"from a fresh memory" in shown
