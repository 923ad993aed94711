"""IGNN on PROTEINS with fixed gradients and with `auto`: the time until each is as good as `ift`.

    python examples/experiments/auto_proteins.py                    # smoke: generated graphs
    python examples/experiments/auto_proteins.py --size cpu --data DIR

All methods of a seed take their steps in turn. A method that has taken all its steps and is not yet
as good as `ift` at its end goes on, until it is or has taken as long as `ift`. The level of a
method is the median of its last three evaluations.
"""

from pathlib import Path

from harness.command import Experiment, main
from harness.graph import GraphSettings, GraphTask
from harness.race import Race

EXPERIMENT = Experiment(
    Path(__file__),
    GraphSettings,
    GraphTask,
    "IGNN on PROTEINS",
    race=Race("accuracy", "accuracy (%)", scale=100),
)

if __name__ == "__main__":
    main(EXPERIMENT)
