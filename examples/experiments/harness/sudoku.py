"""Makes Sudoku puzzles with one solution each, from all 4x4 grids or from random 9x9 grids.

A puzzle is a solved grid from which digits are removed in a random order, as long as the solution
stays unique. `solutions` finds the solutions by trial.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

GRIDS_4X4 = 288  # the number of solved 4x4 grids


@dataclass(frozen=True)
class Puzzles:
    """Puzzles and their solutions.

    Attributes:
        seq: the given digits, shape (count, cells); blank cells are 0.
        labels: the solutions, shape (count, cells).
        box: the side of a box; a grid has box**2 rows.
    """

    seq: Tensor
    labels: Tensor
    box: int

    def draw(self, count: int, generator: torch.Generator, augment: bool) -> tuple[Tensor, Tensor]:
        """Return random puzzles and their solutions, each of shape (count, cells).

        With `augment`, a random symmetry of Sudoku turns each puzzle into another one.
        """
        indices = torch.randint(len(self.seq), (count,), generator=generator)
        seq, labels = self.seq[indices], self.labels[indices]
        if not augment:
            return seq, labels
        places, digits = symmetries(self.box, count, generator)
        return (digits.gather(1, cells.gather(1, places)) for cells in (seq, labels))


def symmetries(box: int, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return random symmetries of Sudoku.

    A symmetry renames the digits. It permutes the bands, and the rows within each band, and does
    the same with columns. Half of the grids are also transposed.

    Returns:
        The cell that comes to each place, shape (count, cells); and the new name of each digit,
        shape (count, box**2 + 1), in which 0 (blank) stays 0.
    """
    size = box**2

    def orders(*shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=generator).argsort(dim=-1)

    def lines() -> Tensor:
        within = orders(box, box)
        return (orders(box)[:, :, None] * box + within).flatten(1)

    rows, columns = lines(), lines()
    places = rows[:, :, None] * size + columns[:, None, :]
    flipped = torch.rand(count, generator=generator) < 0.5
    places = torch.where(flipped[:, None, None], places.transpose(1, 2), places)
    digits = torch.cat([torch.zeros(count, 1, dtype=torch.long), orders(size) + 1], dim=1)
    return places.flatten(1), digits


@functools.cache
def load_puzzles(
    box: int, train_grids: int, test_grids: int, each: int, givens: int, seed: int
) -> tuple[Puzzles, Puzzles]:
    """Return puzzles for training and for tests, which have no grid in common.

    Args:
        box: 2 for 4x4 grids, all of which are known; 3 for 9x9 grids, which are random.
        train_grids: the number of grids to train with.
        test_grids: the number of grids to test with.
        each: the number of puzzles per grid.
        givens: the number of digits that a puzzle keeps. It keeps more if it would have several
            solutions otherwise.
        seed: the seed of the grids and of the digits that are removed.

    Raises:
        ValueError: if there are no such grids; the message says how many there are.
    """
    count = train_grids + test_grids
    if box not in (2, 3):
        raise ValueError(f"box={box}; expected 2 (4x4) or 3 (9x9)")
    if min(train_grids, test_grids, each) < 1 or givens < 0:
        raise ValueError(
            f"{train_grids} and {test_grids} grids, {each} puzzles each, givens={givens}; "
            "expected at least 1 grid and puzzle, and givens of 0 or more"
        )
    if box == 2 and count > GRIDS_4X4:
        raise ValueError(
            f"{train_grids} and {test_grids} 4x4 grids; expected {GRIDS_4X4} together, at most"
        )
    draw = random.Random(seed)
    if box == 2:
        grids = draw.sample(sorted(solutions([0] * 16, box)), count)
    else:
        found: dict[tuple[int, ...], None] = {}
        while len(found) < count:
            found[next(solutions([0] * box**4, box, draw))] = None
        grids = list(found)
    train, test = grids[:train_grids], grids[train_grids:]
    return tuple(_puzzles(part, each, givens, box, draw) for part in (train, test))


def _puzzles(
    grids: Sequence[tuple[int, ...]], each: int, givens: int, box: int, draw: random.Random
) -> Puzzles:
    labels = [grid for grid in grids for _ in range(each)]
    seq = [dug(grid, givens, box, draw) for grid in labels]
    return Puzzles(torch.tensor(seq), torch.tensor(labels), box)


def dug(grid: Sequence[int], givens: int, box: int, draw: random.Random) -> list[int]:
    """Return a puzzle: remove digits in a random order while the solution stays unique.

    Args:
        grid: the solved grid, row by row.
        givens: the number of digits at which to stop.
        box: the side of a box.
        draw: draws the order.
    """
    cells, left = list(grid), len(grid)
    for place in draw.sample(range(len(grid)), len(grid)):
        if left <= givens:
            break
        digit, cells[place] = cells[place], 0
        if len(list(itertools.islice(solutions(cells, box), 2))) == 1:
            left -= 1
        else:
            cells[place] = digit
    return cells


def solutions(
    cells: Sequence[int], box: int, draw: random.Random | None = None
) -> Iterator[tuple[int, ...]]:
    """Yield all solved grids that agree with the given cells.

    The search tries digits in the blank cell in which the fewest digits fit.

    Args:
        cells: the given digits, row by row; 0 for a blank cell.
        box: the side of a box.
        draw: if given, digits are tried in a random order.
    """
    groups = _groups(box)
    used = [0] * (3 * box**2)  # one number per row, column and box, with one bit per digit
    for place, digit in enumerate(cells):
        for group in groups[place] if digit else ():
            if used[group] >> digit & 1:
                return
            used[group] |= 1 << digit
    yield from _completions(
        list(cells), [i for i, digit in enumerate(cells) if not digit], used, groups, draw
    )


def _completions(
    cells: list[int],
    blanks: list[int],
    used: list[int],
    groups: Sequence[tuple[int, int, int]],
    draw: random.Random | None,
) -> Iterator[tuple[int, ...]]:
    """Yield the completions of a grid; lists are changed in place and restored at the end."""
    if not blanks:
        yield tuple(cells)
        return
    size = len(used) // 3
    every, best, fewest = (2 << size) - 2, 0, size + 1
    fits = 0
    for index, place in enumerate(blanks):
        row, column, square = groups[place]
        free = every & ~(used[row] | used[column] | used[square])
        count = free.bit_count()
        if count < fewest:
            best, fewest, fits = index, count, free
            if count < 2:
                break
    place = blanks.pop(best)
    digits = [digit for digit in range(1, size + 1) if fits >> digit & 1]
    if draw is not None:
        draw.shuffle(digits)
    for digit in digits:
        cells[place] = digit
        for group in groups[place]:
            used[group] ^= 1 << digit
        yield from _completions(cells, blanks, used, groups, draw)
        for group in groups[place]:
            used[group] ^= 1 << digit
    cells[place] = 0
    blanks.insert(best, place)


@functools.cache
def _groups(box: int) -> tuple[tuple[int, int, int], ...]:
    """Return the row, the column and the box of each cell, as numbers below 3 * box**2."""
    size = box**2
    return tuple(
        (row, size + column, 2 * size + row // box * box + column // box)
        for row in range(size)
        for column in range(size)
    )
