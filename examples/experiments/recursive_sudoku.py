"""A tiny recursive model (TRM) on Sudoku, with several gradients of its loop.

    python examples/experiments/recursive_sudoku.py              # smoke: a few 4x4 puzzles
    python examples/experiments/recursive_sudoku.py --size cpu --time 41
    torchrun --nproc-per-node 3 examples/experiments/recursive_sudoku.py --size paper

This is not an experiment of the paper. The model is that of "Less is More: Recursive Reasoning with
Tiny Networks" (Jolicoeur-Martineau 2025), from the package tiny-recursive-model. Its loop consists
of the refinement blocks of one call. Its own training has a graph of the last block. With torchrun,
each process trains some of the runs.
"""

from pathlib import Path

from harness.command import Experiment, main
from harness.recursive import RecursiveSettings, RecursiveTask
from harness.results import Column, Curve, best, last, mean

EXPERIMENT = Experiment(
    Path(__file__),
    RecursiveSettings,
    RecursiveTask,
    "TRM on Sudoku by gradient method",
    columns=[
        Column("solved (%)", last("solved", 100)),
        Column("best (%)", best("solved", 100)),
        Column("cells (%)", last("cells", 100)),
        Column("memory (MiB)", best("memory"), "{:.2f}"),
        Column("residual, first call", last("residual_first"), "{:.2f}"),
        Column("last call", last("residual"), "{:.2f}"),
        Column("rho", last("rho"), "{:.2f}"),
        Column("cosine", mean("cosine"), "{:.2f}"),
    ],
    curves=[
        Curve("solved", "test puzzles solved"),
        Curve("train_loss", "training loss", log=True),
        Curve("cosine", "cosine with backpropagation"),
        Curve("rho", "spectral radius of the loop's map", log=True),
    ],
    joint=False,
)

if __name__ == "__main__":
    main(EXPERIMENT)
