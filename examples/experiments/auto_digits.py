"""MDEQ on digits with fixed gradients and with `auto`: the time until each is as good as `ift`.

    python examples/experiments/auto_digits.py                    # smoke: few digits
    python examples/experiments/auto_digits.py --size cpu

All methods of a seed take their steps in turn. A method that has taken all its steps and is not yet
as good as `ift` at its end goes on, until it is or has taken as long as `ift`. The level of a
method is the median of its last three evaluations.
"""

from pathlib import Path

from harness.command import Experiment, main
from harness.race import Race
from harness.vision import VisionSettings, VisionTask

EXPERIMENT = Experiment(
    Path(__file__),
    VisionSettings,
    VisionTask,
    "MDEQ on digits",
    race=Race("accuracy", "accuracy (%)", scale=100),
)

if __name__ == "__main__":
    main(EXPERIMENT)
