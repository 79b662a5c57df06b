"""Documents made from a seed, for tests of the data path."""

import numpy as np

WORDS = [
    *("the", "of", "and", "to", "in", "a", "is", "that", "for", "it", "was", "with", "sea", "whale", "ship"),
    *("captain", "sailor", "harbour", "storm", "island", "morning", "evening", "letter", "house", "garden"),
    *("window", "river", "mountain", "forest", "winter", "summer", "music", "silver", "copper", "paper"),
]


def document(seed: int, num_words: int = 80) -> str:
    """Words drawn at random, in lines of ten."""
    words = np.random.default_rng([seed, 77]).choice(WORDS, num_words).tolist()
    lines = [" ".join([f"Line {seed}-{i}", *words[i : i + 10]]) for i in range(0, num_words, 10)]
    return "\n".join(lines)


def documents(count: int, first: int = 0, num_words: int = 80) -> list[str]:
    """`count` different documents."""
    return [document(seed, num_words) for seed in range(first, first + count)]
