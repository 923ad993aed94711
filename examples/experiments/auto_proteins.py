"""IGNN on PROTEINS by fixed gradients and by `auto`: how soon each is as good as `ift`.

    python examples/experiments/auto_proteins.py                    # smoke: generated graphs
    python examples/experiments/auto_proteins.py --size cpu --data DIR

All methods of a seed take their steps in turn. One that is not as good as `ift` is at its end goes
on until it is, or has taken as long. What a method has reached is the median of three evaluations.
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
