"""Loads texts for language models: files of whitespace-separated words (WikiText), or characters.

A text becomes a row of numbers. `columns` cuts it into several texts side by side, and `segment`
returns the piece of all of them that a step trains on.
"""

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
    """Return a training text and a test text as numbers, and the size of the vocabulary.

    Words are numbered by how often they occur in the training text. A word that occurs only in the
    test text gets the number of the unknown word. Each line, also an empty one, ends with a token
    of its own, as in the official code.

    Args:
        path: the folder of the texts, or None.
        train_file: the name of the training text in the folder. If it is empty, Python's own
            language reference is the text.
        test_file: the name of the test text in the folder. If it is empty, the last tenth of the
            lines of the training text is the test text.
        characters: whether each character is a word.

    Returns:
        Two tensors of shape (tokens,), int64, and the size of the vocabulary.

    Raises:
        SystemExit: if a file cannot be read, or if a path is given and not needed; the message says
            what is expected.
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
    """Return a text cut into `count` texts of equal length, shape (count, tokens)."""
    length = len(text) // count
    return text[: count * length].view(count, length)


def segment(texts: Tensor, number: int, length: int) -> Tensor:
    """Return a piece of all texts; after the last piece, the first one follows again.

    Args:
        texts: shape (count, tokens).
        number: the number of the piece, counted from 0.
        length: the number of tokens to predict.

    Returns:
        Shape (count, length + 1): one token to begin with, and the tokens to predict.
    """
    pieces = segments(texts, length)
    begin = number % pieces * length
    return texts[:, begin : begin + length + 1]


def segments(texts: Tensor, length: int) -> int:
    """Return the number of pieces with `length` tokens to predict.

    Raises:
        SystemExit: if the texts are too short for one piece.
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
    """Return the words, or the characters, of lines, each of which ends with `END`."""
    return [word for line in lines for word in (*(line if characters else line.split()), END)]


def _language_reference() -> list[str]:
    """Return the lines of the language reference that Python ships with."""
    from pydoc_data.topics import topics

    return [line for name in sorted(topics) for line in topics[name].splitlines()]
