"""Labelled texts of local files (CLINC150's JSON, CSV, JSON lines), split into tasks of new classes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from nested_learning.data.records import Record, format_of, read_json, read_records, type_name

LABELS = ("label", "category", "intent")
"""Names that the column of labels may have, in the order in which they are looked for."""


class Example(NamedTuple):
    """A text and its class."""

    text: str
    label: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassTask:
    """New classes, with training and test examples."""

    classes: tuple[str, ...]
    train: tuple[Example, ...]
    test: tuple[Example, ...]


def read_examples(path: Path, split: str, label_field: str | None = None) -> list[Example]:
    """Labelled texts of a file.

    Args:
        path: `.json` with a list of [text, label] under the name of a split (CLINC150; out-of-scope texts are
            under other names), `.csv` with a header, or `.jsonl`. Texts are in the field "text".
        split: "train" or "test", for `.json` only; other files hold one split.
        label_field: field of the labels; None = the first of `LABELS` that the record has.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another kind of file, or a missing field or label.
    """
    if format_of(path) not in (".json", ".csv", ".jsonl"):
        raise ValueError(f"examples must be in a .json, .csv or .jsonl file, got {path}")
    if format_of(path) == ".json":
        return _split_of(path, split)
    return [_example(record, label_field) for record in read_records(path)]


def _split_of(path: Path, split: str) -> list[Example]:
    """The examples of a split of a file like CLINC150's."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold an object with lists by split, got {type_name(content)}")
    if split not in content:
        raise ValueError(f"{path} holds no {split!r}, but {', '.join(content) or 'nothing'}")
    entries = content[split]
    if not isinstance(entries, list):
        raise ValueError(f"{path}, {split!r}: must be a list, got {type_name(entries)}")
    examples = []
    for number, entry in enumerate(entries, 1):
        where = f"{path}, {split!r}, record {number}"
        if not isinstance(entry, list) or len(entry) != 2:
            raise ValueError(f"{where}: must be [text, label], got {entry!r:.80}")
        text, label = entry
        examples.append(_labelled(where, text, label, "label"))
    return examples


def _example(record: Record, label_field: str | None) -> Example:
    where, row = record
    name = next((name for name in ([label_field] if label_field else LABELS) if name in row), None)
    if name is None or "text" not in row:
        wanted = label_field or " or ".join(LABELS)
        raise ValueError(f"{where}: must have the fields text and {wanted}, got {', '.join(map(str, row))}")
    return _labelled(where, row["text"], row[name], name)


def _labelled(where: str, text: object, label: object, name: str) -> Example:
    if not isinstance(text, str):
        raise ValueError(f"{where}: text must be text, got {type_name(text)}")
    if not isinstance(label, str | int) or not str(label).strip():
        raise ValueError(f"{where}: {name} must name a class, got {label!r}")
    return Example(text, str(label))


def hold_out(examples: Sequence[Example], every: int = 5) -> tuple[list[Example], list[Example]]:
    """Split examples into training and test: every `every`-th example of a class is for the test."""
    seen: dict[str, int] = {}
    parts: tuple[list[Example], list[Example]] = ([], [])
    for example in examples:
        seen[example.label] = seen.get(example.label, 0) + 1
        parts[seen[example.label] % every == 0].append(example)
    return parts


def split_tasks(
    train: Sequence[Example],
    test: Sequence[Example],
    tasks: int,
    seed: int,
    per_class: tuple[int | None, int | None] = (None, None),
) -> list[ClassTask]:
    """Classes in random order, in tasks whose sizes differ by at most one class.

    Args:
        per_class: most training and test examples of a class, drawn at random; None = all.

    Raises:
        ValueError: more tasks than classes, or a class without training or test examples.
    """
    groups = [_by_label(part) for part in (train, test)]
    if lonely := sorted(groups[0].keys() ^ groups[1].keys()):
        raise ValueError(f"every class needs training and test examples; {lonely[0]!r} has only one kind")
    classes = sorted(groups[0])
    if not 1 <= tasks <= len(classes):
        raise ValueError(f"tasks must be from 1 to the {len(classes)} classes, got {tasks}")
    rng = random.Random(seed)
    rng.shuffle(classes)

    def drawn(group: dict[str, list[Example]], names: list[str], most: int | None) -> tuple[Example, ...]:
        chosen = [rng.sample(group[name], len(group[name]))[:most] for name in names]
        mixed = [example for part in chosen for example in part]
        rng.shuffle(mixed)
        return tuple(mixed)

    made = []
    for i in range(tasks):
        names = classes[i * len(classes) // tasks : (i + 1) * len(classes) // tasks]
        parts = (drawn(group, names, most) for group, most in zip(groups, per_class, strict=True))
        made.append(ClassTask(classes=tuple(names), train=next(parts), test=next(parts)))
    return made


def _by_label(examples: Sequence[Example]) -> dict[str, list[Example]]:
    groups: dict[str, list[Example]] = {}
    for example in examples:
        groups.setdefault(example.label, []).append(example)
    return groups
