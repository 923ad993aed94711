"""MDEQ (the large one) on CIFAR-10 with UPG (Section 4.3 of the supplement).

    python examples/experiments/mdeq_cifar10.py                  # smoke: generated images
    python examples/experiments/mdeq_cifar10.py --size cpu --data cifar10-jpeg.npz
    torchrun --nproc-per-node 4 examples/experiments/mdeq_cifar10.py --size paper --data DIR

The data are the archive cifar10-jpeg.npz, or torchvision's folder of CIFAR-10.
"""

from pathlib import Path

from harness.command import Experiment, main
from harness.results import Column, Curve, best, last
from harness.vision import VisionSettings, VisionTask

EXPERIMENT = Experiment(
    Path(__file__),
    VisionSettings,
    VisionTask,
    "MDEQ on CIFAR-10",
    columns=[
        Column("accuracy (%)", last("accuracy", 100)),
        Column("best (%)", best("accuracy", 100)),
        Column("rho", last("rho"), "{:.2f}"),
        Column("rho, damped", last("rho_damped"), "{:.2f}"),
    ],
    curves=[
        Curve("accuracy", "test accuracy"),
        Curve("train_loss", "training loss", log=True),
        Curve("rho", "spectral radius of df/dh", log=True),
    ],
)

if __name__ == "__main__":
    main(EXPERIMENT)
