"""MDEQ-Tiny on CIFAR-10, trained by several libraries: time to TorchDEQ's implicit accuracy.

    python examples/experiments/time_to_accuracy.py              # smoke: generated images
    python examples/experiments/time_to_accuracy.py --size cpu --data cifar10-jpeg.npz

All runs of a seed take their steps in turn. A run that has taken all its steps and is not yet as
good as `torchdeq-ift` at its end goes on, until it is or has taken as long as `torchdeq-ift`. The
runs of silva-networks need its environment (`make .venv-silva/.installed`, and the extra
`experiments`). The run of phantom_grad needs a checkout of that repository.
"""

from pathlib import Path

from harness.command import Experiment, main
from harness.race import Race
from harness.vision import VisionSettings, VisionTask

EXPERIMENT = Experiment(
    Path(__file__),
    VisionSettings,
    VisionTask,
    "MDEQ-Tiny on CIFAR-10 by library",
    race=Race("accuracy", "accuracy (%)", scale=100, base="torchdeq-ift"),
)

if __name__ == "__main__":
    main(EXPERIMENT)
