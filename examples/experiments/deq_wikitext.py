"""Deep equilibrium transformers on WikiText by gradient method (Section 4.3 of the supplement).

    python examples/experiments/deq_wikitext.py                  # smoke: Python's own reference
    python examples/experiments/deq_wikitext.py --size cpu --data DIR --time 11
    torchrun --nproc-per-node 4 examples/experiments/deq_wikitext.py --size paper --data DIR

The data are a folder of text files with whitespace-separated tokens. The model differs from the
official code in three points: positions are rotary, a piece of text does not attend to the piece
before it, and one softmax covers all words.
"""

from pathlib import Path

from harness.command import Experiment, main
from harness.language import LanguageSettings, LanguageTask
from harness.results import Column, Curve, best, last

EXPERIMENT = Experiment(
    Path(__file__),
    LanguageSettings,
    LanguageTask,
    "Deep equilibrium transformers on WikiText",
    columns=[
        Column("perplexity", last("perplexity")),
        Column("best", best("perplexity", choose=min)),
        Column("train loss", last("train_loss"), "{:.3f}"),
        Column("rho", last("rho"), "{:.2f}"),
        Column("residual", last("residual"), "{:.1e}"),
    ],
    curves=[
        Curve("perplexity", "test perplexity", log=True),
        Curve("train_loss", "training loss"),
        Curve("rho", "spectral radius of df/dh", log=True),
    ],
)

if __name__ == "__main__":
    main(EXPERIMENT)
