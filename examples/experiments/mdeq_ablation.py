"""MDEQ-Tiny on CIFAR-10 with several gradients (Section 4.2 of the supplement).

    python examples/experiments/mdeq_ablation.py                 # smoke: generated images
    python examples/experiments/mdeq_ablation.py --size cpu --data cifar10-jpeg.npz --time 11
    torchrun --nproc-per-node 2 examples/experiments/mdeq_ablation.py --size paper --data DIR

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
    "MDEQ-Tiny on CIFAR-10 by gradient method",
    columns=[
        Column("accuracy (%)", last("accuracy", 100)),
        Column("best (%)", best("accuracy", 100)),
        Column("rho", last("rho"), "{:.2f}"),
        Column("rho, damped", last("rho_damped"), "{:.2f}"),
        Column("residual", last("residual"), "{:.1e}"),
    ],
    curves=[
        Curve("accuracy", "test accuracy"),
        Curve("accuracy", "test accuracy", x="seconds"),
        Curve("rho", "spectral radius of df/dh", log=True),
    ],
)

if __name__ == "__main__":
    main(EXPERIMENT)
