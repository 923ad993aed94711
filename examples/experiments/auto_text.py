"""A transformer on Shakespeare by fixed gradients and by `auto`: how soon each is like `ift`.

    python examples/experiments/auto_text.py                    # smoke: Python's own reference
    python examples/experiments/auto_text.py --size cpu --data DIR

All methods of a seed take their steps in turn. One that is not as good as `ift` is at its end goes
on until it is, or has taken as long. What a method has reached is the median of three evaluations.
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
