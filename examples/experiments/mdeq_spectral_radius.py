"""Spectral radii of f and of the damped map during training (Section 4.3 of the supplement).

    python examples/experiments/mdeq_spectral_radius.py          # smoke: generated images
    python examples/experiments/mdeq_spectral_radius.py --size cpu --data cifar10-jpeg.npz
    torchrun --nproc-per-node 2 examples/experiments/mdeq_spectral_radius.py --size paper --data DIR

The data are the archive cifar10-jpeg.npz, or torchvision's folder of CIFAR-10.
"""

from pathlib import Path

from harness.command import Experiment, main
from harness.results import Column, Curve, last
from harness.vision import VisionSettings, VisionTask

EXPERIMENT = Experiment(
    Path(__file__),
    VisionSettings,
    VisionTask,
    "MDEQ-Tiny on CIFAR-10: spectral radii on test images",
    columns=[
        Column("rho", last("rho"), "{:.3f}"),
        Column("largest rho", last("rho_max"), "{:.3f}"),
        Column("rho, damped", last("rho_damped"), "{:.3f}"),
        Column("accuracy (%)", last("accuracy", 100)),
    ],
    curves=[
        Curve("rho", "spectral radius of df/dh", log=True),
        Curve("rho_damped", "of the damped map", log=True),
        Curve("accuracy", "test accuracy"),
    ],
)

if __name__ == "__main__":
    main(EXPERIMENT)
