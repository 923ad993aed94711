"""The accuracy of MDEQ with and without damped steps at inference (Section 2 of the supplement).

    python examples/experiments/mdeq_inference.py                # smoke: generated images
    python examples/experiments/mdeq_inference.py --size cpu --data cifar10-jpeg.npz
    torchrun --nproc-per-node 2 examples/experiments/mdeq_inference.py --size paper --data DIR

The data are the archive cifar10-jpeg.npz, or torchvision's folder of CIFAR-10.
"""

from pathlib import Path

from harness.command import Experiment, main
from harness.results import Column, Curve, last
from harness.training import Record
from harness.vision import VisionSettings, VisionTask


def columns(records: list[Record]) -> list[Column]:
    """Return the columns of the table: one per number of steps, and the residual."""
    prefix = "accuracy_"
    keys = {key for record in records for row in record.history for key in row}
    tried = sorted(int(key.removeprefix(prefix)) for key in keys if key.startswith(prefix))
    return [
        Column("accuracy (%), no step", last("accuracy", 100), "{:.2f}"),
        *(Column(f"{k} steps", last(f"{prefix}{k}", 100), "{:.2f}") for k in tried),
        Column("residual", last("residual"), "{:.1e}"),
    ]


EXPERIMENT = Experiment(
    Path(__file__),
    VisionSettings,
    VisionTask,
    "MDEQ-Tiny on CIFAR-10: damped steps after the solve at inference",
    columns=columns,
    curves=[
        Curve("accuracy", "test accuracy, no step"),
        Curve("train_loss", "training loss", log=True),
        Curve("residual", "residual of the solve", log=True),
    ],
)

if __name__ == "__main__":
    main(EXPERIMENT)
