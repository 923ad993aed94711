"""Accuracy with and without unrolling steps at inference (Section 2 of the supplement).

    python examples/experiments/mdeq_inference.py                # smoke: generated images
    python examples/experiments/mdeq_inference.py --size cpu --data cifar10-jpeg.npz
    torchrun --nproc-per-node 2 examples/experiments/mdeq_inference.py --size paper --data DIR

The data are the archive of JPEGs, or torchvision's folder of CIFAR-10.
"""

from pathlib import Path

from harness.command import Experiment, main
from harness.results import Column, Curve, last
from harness.vision import VisionSettings, VisionTask

EXPERIMENT = Experiment(
    Path(__file__),
    VisionSettings,
    VisionTask,
    "MDEQ-Tiny on CIFAR-10: damped steps after the solve at inference",
    columns=[
        Column("accuracy (%), none", last("accuracy", 100), "{:.2f}"),
        Column("1 step", last("accuracy_1", 100), "{:.2f}"),
        Column("5 steps", last("accuracy_5", 100), "{:.2f}"),
        Column("20 steps", last("accuracy_20", 100), "{:.2f}"),
        Column("residual", last("residual"), "{:.1e}"),
    ],
    curves=[
        Curve("accuracy", "test accuracy, no step"),
        Curve("accuracy_5", "test accuracy, 5 steps"),
        Curve("accuracy_20", "test accuracy, 20 steps"),
    ],
)

if __name__ == "__main__":
    main(EXPERIMENT)
