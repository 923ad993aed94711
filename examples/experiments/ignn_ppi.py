"""IGNN on PPI with several gradients, the best of three runs (Section 4.3 of the supplement).

    python examples/experiments/ignn_ppi.py                      # smoke: generated graphs
    torchrun --nproc-per-node 3 examples/experiments/ignn_ppi.py --size paper --data DIR

F1 is micro-averaged over the labels of the nodes in the test graphs, at the best validation epoch.
With torchrun, each process trains some of the runs.
"""

from pathlib import Path

from harness.command import Experiment, main
from harness.graph import GraphSettings, GraphTask
from harness.results import Column, Curve, best, last

EXPERIMENT = Experiment(
    Path(__file__),
    GraphSettings,
    GraphTask,
    "IGNN on PPI",
    columns=[
        Column("F1 (%)", best("f1", 100, by="validation_f1")),
        Column("last (%)", last("f1", 100)),
        Column("train loss", last("train_loss"), "{:.3f}"),
    ],
    curves=[Curve("f1", "F1 on the test graphs"), Curve("train_loss", "training loss")],
    joint=False,
)

if __name__ == "__main__":
    main(EXPERIMENT)
