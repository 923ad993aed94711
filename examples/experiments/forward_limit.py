"""MDEQ-Tiny on CIFAR-10: which number of forward evaluations trains as well as 22.

    python examples/experiments/forward_limit.py                 # smoke: generated images
    python examples/experiments/forward_limit.py --size cpu --data cifar10-jpeg.npz

All runs of a seed take their steps in turn. A run that has taken all its steps and is not yet as
good as `upg-22` at its end goes on, until it is or has taken as long as `upg-22`.
"""

from pathlib import Path

from harness.command import Experiment, main
from harness.race import Race
from harness.vision import VisionSettings, VisionTask

EXPERIMENT = Experiment(
    Path(__file__),
    VisionSettings,
    VisionTask,
    "MDEQ-Tiny on CIFAR-10 by evaluations of the forward solve",
    race=Race("accuracy", "accuracy (%)", scale=100, base="upg-22"),
)

if __name__ == "__main__":
    main(EXPERIMENT)
