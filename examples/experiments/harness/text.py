"""Text to model: files of whitespace-separated words, as WikiText's are, or of characters."""

from __future__ import annotations

import functools
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

UNKNOWN, END = "<unk>", "<eos>"
HELP = (
    "a folder with train.txt and test.txt, WikiText-103 for instance: whitespace-separated tokens; "
    "other names with --set train_file=NAME test_file=NAME"
)


@functools.cache
def load_text(
    path: Path | None, train_file: str, test_file: str, characters: bool = False
) -> tuple[Tensor, Tensor, int]:
    """Return training and test text as numbers of words, and how many words there are.

    Words are numbered by how often the training text has them. A word that only the test text has
    is unknown. A line, an empty one too, ends with a token of its own, as in the official code.

    Args:
        path: the folder.
        train_file: name in it. Without a name, Python's own language reference is the text.
        test_file: name in it; without one the last tenth of the lines of the other is the test.
        characters: whether each of these is a word.

    Returns:
        Two tensors of shape (tokens,), int64, and the size of the vocabulary.

    Raises:
        SystemExit: if a file cannot be read, or a path is given that is not asked for; says what is
            expected.
    """
    if not train_file and path is not None:
        raise SystemExit(f"--data {path} without names of files; expected {HELP}")
    if train_file and path is None:
        raise SystemExit(f"{train_file} needs --data DIR: {HELP}")
    lines = _language_reference() if path is None else _lines(path / train_file)
    if path is not None and test_file:
        parts = lines, _lines(path / test_file)
    else:
        cut = len(lines) * 9 // 10
        parts = lines[:cut], lines[cut:]
    train, test = (_words(part, characters) for part in parts)
    counts = Counter(train)
    counts.pop(UNKNOWN, None)
    words = [UNKNOWN, *(word for word, _ in counts.most_common())]
    number = {word: i for i, word in enumerate(words)}
    as_numbers = [torch.tensor([number.get(word, 0) for word in text]) for text in (train, test)]
    return as_numbers[0], as_numbers[1], len(words)


def columns(text: Tensor, count: int) -> Tensor:
    """Return a text as that many texts side by side, shape (count, tokens), the rest left out."""
    length = len(text) // count
    return text[: count * length].view(count, length)


def segment(texts: Tensor, number: int, length: int) -> Tensor:
    """Return the n-th piece of all texts, after the last one again the first.

    Args:
        texts: shape (count, tokens).
        number: of the piece.
        length: tokens to predict.

    Returns:
        Shape (count, length + 1): a token to begin with, and those to predict.
    """
    pieces = segments(texts, length)
    begin = number % pieces * length
    return texts[:, begin : begin + length + 1]


def segments(texts: Tensor, length: int) -> int:
    """Return how many pieces texts have.

    Raises:
        SystemExit: if there is none.
    """
    pieces = (texts.shape[1] - 1) // length
    if pieces < 1:
        raise SystemExit(
            f"a text of {texts.numel()} tokens for {texts.shape[0]} sequences of {length}; "
            f"expected at least {texts.shape[0] * (length + 1)}"
        )
    return pieces


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise SystemExit(
            f"{path} cannot be read: {reason}; expected a folder with the texts that the settings "
            "train_file and test_file name"
        ) from None


def _words(lines: list[str], characters: bool) -> list[str]:
    return [word for line in lines for word in (*(line if characters else line.split()), END)]


def _language_reference() -> list[str]:
    from pydoc_data.topics import topics

    return [line for name in sorted(topics) for line in topics[name].splitlines()]
