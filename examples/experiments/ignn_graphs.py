"""IGNN on COX2 and PROTEINS with several gradients, ten folds (Section 4.3 of the supplement).

    python examples/experiments/ignn_graphs.py                   # smoke: generated graphs
    python examples/experiments/ignn_graphs.py --size cpu --data DIR --time 11
    torchrun --nproc-per-node 4 examples/experiments/ignn_graphs.py --size paper --data DIR

The official code reports the best epoch of each fold on the test graphs of that fold, which is too
optimistic; the column `best` does the same. The official code normalises its test graphs in another
way than its training graphs (each edge counts twice); this is not done here. With torchrun, each
process trains some of the folds.
"""

from pathlib import Path

from harness.command import Experiment, main
from harness.graph import GraphSettings, GraphTask
from harness.results import Column, Curve, best, last

EXPERIMENT = Experiment(
    Path(__file__),
    GraphSettings,
    GraphTask,
    "IGNN: classification of graphs",
    columns=[
        Column("best accuracy (%)", best("accuracy", 100)),
        Column("last (%)", last("accuracy", 100)),
        Column("train loss", last("train_loss"), "{:.3f}"),
    ],
    curves=[
        Curve("accuracy", "accuracy on the fold's test graphs"),
        Curve("train_loss", "training loss"),
        Curve("accuracy", "accuracy on the fold's test graphs", x="seconds"),
    ],
    joint=False,
)

if __name__ == "__main__":
    main(EXPERIMENT)
