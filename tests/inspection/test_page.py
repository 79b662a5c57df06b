"""The page: well-formed, with all numbers inside, and alive in a browser where there is one."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import quote

import pytest
import torch

from nested_learning.commands import nl
from nested_learning.data.tokenizer import ByteTokenizer, train_sentencepiece
from nested_learning.inspection import Inspection, inspect_memories
from nested_learning.inspection.page import inspection_page, shares_of_scale
from nested_learning.inspection.words import token_texts
from nested_learning.levels import LevelSpec
from nested_learning.models.config import HopeConfig
from nested_learning.models.lm import HopeLM

WILD = 'a <b>&amp;</b> </script> "ä"\n</span>'


NAME = "a/%b</script>"


def make_page() -> tuple[Inspection, list[str], str]:
    torch.manual_seed(0)
    levels = (LevelSpec(name=NAME, chunk_size=8), LevelSpec())
    model = HopeLM(HopeConfig(vocab_size=257, dim=16, num_layers=1, num_heads=2, chunk_size=4, levels=levels))
    tokenizer = ByteTokenizer()
    ids = [tokenizer.eos_id, *tokenizer.encode(WILD)]
    inspection, texts = inspect_memories(model, torch.tensor(ids)), token_texts(tokenizer, ids)
    return inspection, texts, inspection_page(inspection, texts, "Title <i>", "Lead & more")


@pytest.fixture(scope="module")
def made() -> tuple[Inspection, list[str], str]:
    return make_page()


class Text(HTMLParser):
    """Tokens of the text, what each tag holds by its id, and whether tags are closed in order."""

    VOID = frozenset({"meta", "img", "br", "input"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[tuple[str, dict[str, str | None]]] = []
        self.by_id: dict[str, str] = {}
        self.given: dict[str, dict[str, str | None]] = {}
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append((tag, dict(attrs)))
        if name := dict(attrs).get("id"):
            self.by_id[name], self.given[name] = "", dict(attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        for _, attributes in self.open:
            if name := attributes.get("id"):
                self.by_id[name] += data

    def shares(self) -> list[float]:
        """Where every token lies on the scale of its colour."""
        count = sum(bool(re.fullmatch(r"t\d+", name)) for name in self.by_id)
        styles = [str(self.given[f"t{i}"]["style"]) for i in range(count)]
        return [float(re.findall(r"--v: ?([\d.]+)", style)[0]) for style in styles]


def test_the_page_holds_the_text_and_loads_nothing(made) -> None:
    inspection, _, page = made
    read = Text(page)
    assert read.by_id["text"].replace("↵", "").replace("·", "") == "⟨end⟩" + WILD
    assert not re.search(r"(src|href)=\"(?!data:|#)|@import|url\(", page)
    assert read.shares() == pytest.approx(shares_of_scale(inspection.loss)[0], abs=0.006)


def test_the_numbers_of_the_script_are_those_of_the_inspection(made) -> None:
    inspection, _, page = made
    data = json.loads(Text(page).by_id["data"])
    assert list(data["memories"]) == [memory.key for memory in inspection.memories]
    for memory in inspection.memories:
        held = data["memories"][memory.key]
        assert held["ends"] == list(memory.ends)
        for name, scale in held["values"].items():
            for mine, value in zip(scale["of"], memory.per_token(name).tolist(), strict=True):
                assert (mine is None) == (value != value) and (
                    mine is None or mine == pytest.approx(value, 6e-3)
                )


def test_a_scale_ends_at_the_percentiles_and_knows_gaps() -> None:
    values = torch.tensor([float(v) for v in range(101)] + [torch.nan])
    shares, low, high = shares_of_scale(values)
    assert (low, high) == pytest.approx((2.0, 98.0))
    assert shares[50] == pytest.approx(0.5) and shares[0] == 0.0 and shares[100] == 1.0 and shares[101] == 0.0
    assert shares_of_scale(torch.full((3,), 7.0)) == ([0.0] * 3, 7.0, 7.0)
    assert shares_of_scale(torch.full((2,), torch.nan)) == ([0.0] * 2, 0.0, 0.0)


def test_the_texts_of_tokens_make_the_text() -> None:
    tokenizer = ByteTokenizer()
    ids = [256, *tokenizer.encode("Aä€😀"), 0xFF, 65]
    assert token_texts(tokenizer, ids) == [
        "⟨end⟩",
        "A",
        "ä",
        "·",
        "€",
        "·",
        "·",
        "😀",
        "·",
        "·",
        "·",
        "�",
        "A",
    ]
    text = "one two  three\nfour ä\n" * 20
    pieces = train_sentencepiece([text], vocab_size=290)
    assert "".join(token_texts(pieces, pieces.encode(text))).replace("·", "") == text


@pytest.mark.thorough
def test_the_command_writes_page_and_numbers(run_folder: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("Äpfel.txt").write_text("Die Äpfel <b> lagen im Gras.\n" * 2, encoding="utf-8")
    words = [
        "inspect",
        str(run_folder),
        "--text",
        "Äpfel.txt",
        "--tokens",
        "30",
        "--json",
        "new/numbers.json",
    ]
    assert nl.main(words) == 0
    said = capsys.readouterr().out
    (page,) = Path("outputs/inspect").glob("tiny-*/Äpfel.html")
    assert str(page) in said and "block 0, M_k" in said and "29 tokens" in said
    assert Text(page.read_text(encoding="utf-8")).by_id["text"].startswith("⟨end⟩Die Ä·pfel <b> lagen")
    assert len(json.loads(Path("new/numbers.json").read_text())["loss"]) == 30
    Path("short.txt").write_text("ab")
    for wrong, complaint in (
        (["--text", "short.txt"], "must be at least 4"),
        (["--text", "Äpfel.txt", "--tokens", "5000"], "--tokens must be from 1 to 4096, got 5000"),
        (["--text", "Äpfel.txt", "--output", "page.pdf"], "--output must end in .html, got page.pdf"),
        (["--text", "none.txt"], "none.txt: No such file"),
    ):
        assert nl.main(["inspect", str(run_folder), *wrong]) == 2
        told = capsys.readouterr().err
        assert complaint in told and told.count("\n") == 1


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.thorough
@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_a_browser_colours_the_text_by_what_is_chosen(made, tmp_path: Path) -> None:
    inspection, _, page = made
    (tmp_path / "page.html").write_text(page, encoding="utf-8")

    def opened(choice: str) -> Text:
        quiet = ("background-networking", "component-update", "sync", "gpu")
        command = [
            *(str(BROWSER), "--headless", "--no-sandbox", "--no-first-run", "--enable-logging=stderr"),
            *(f"--disable-{name}" for name in quiet),
            *(f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"),
            f"{(tmp_path / 'page.html').as_uri()}#{choice}",
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        assert "CONSOLE" not in done.stderr, done.stderr
        return Text(done.stdout.removeprefix("<!DOCTYPE html>"))

    assert opened("loss").shares() == pytest.approx(shares_of_scale(inspection.loss)[0], abs=0.02)
    level = inspection[f"0.level:{NAME}"]
    read = opened(quote(level.key, safe="") + "/contribution")
    assert read.shares() == pytest.approx(shares_of_scale(level.per_token("contribution"))[0], abs=0.02)
    memory = inspection["0.k"]
    read = opened("0.k/surprise/7")
    assert read.shares() == pytest.approx(shares_of_scale(memory.per_token("surprise"))[0], abs=0.02)
    ends = [
        i for i in range(len(inspection.tokens)) if "end" in str(read.given[f"t{i}"].get("class")).split()
    ]
    assert ends == [end - 1 for end in memory.ends]
    told = re.findall(r"η ([\d.e-]+)", read.by_id["about"])
    assert float(told[-1]) == pytest.approx(float(memory.per_token("eta")[7]), rel=6e-3)
