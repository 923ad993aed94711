"""MDEQ-Small on ImageNet with UPG (Section 4.3 of the supplement).

The data are a folder with train/ and val/, each with one subfolder of images per class.

    python examples/experiments/mdeq_imagenet.py                  # smoke: generated images
    python examples/experiments/mdeq_imagenet.py --size cpu --data FOLDER
    torchrun --nproc-per-node 8 examples/experiments/mdeq_imagenet.py --size paper --data DIR
"""

from pathlib import Path

from harness.command import Experiment, main
from harness.results import Column, Curve, best, last
from harness.vision import VisionSettings, VisionTask

EXPERIMENT = Experiment(
    Path(__file__),
    VisionSettings,
    VisionTask,
    "MDEQ-Small on ImageNet",
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
