"""A transformer on Shakespeare with fixed gradients and with `auto`: the time to match `ift`.

    python examples/experiments/auto_text.py                    # smoke: Python's own reference
    python examples/experiments/auto_text.py --size cpu --data DIR

All methods of a seed take their steps in turn. A method that has taken all its steps and is not yet
as good as `ift` at its end goes on, until it is or has taken as long as `ift`. The level of a
method is the median of its last three evaluations.
"""

from pathlib import Path

from harness.command import Experiment, main
from harness.language import LanguageSettings, LanguageTask
from harness.race import Race

EXPERIMENT = Experiment(
    Path(__file__),
    LanguageSettings,
    LanguageTask,
    "Deep equilibrium transformer on tiny Shakespeare",
    race=Race("perplexity", "test perplexity", higher=False, text="{:.2f}"),
)

if __name__ == "__main__":
    main(EXPERIMENT)
