"""What it costs to find out whether samples are coupled: MDEQ-tiny's first step and later ones.

    python benchmarks/inspection.py --repeats 9

Each repeat trains two fresh models of the same weights for three steps in turn, one of which is
told that its samples are independent. Printed are ratios of medians: the step that asks over the
same step that does not, first and later, and the evaluations of f and products that asking took.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import Tensor

import deq_phantom_plugin as dpp
from deq_phantom_plugin.adapters.mdeq import MDEQ
from deq_phantom_plugin.adjoint import linearization

STEPS = 3


class Counted:
    """Evaluations of f, and products that the question took."""

    def __init__(self, model: MDEQ) -> None:
        self.evaluations = self.products = 0
        model.layer.register_forward_hook(lambda *args: self._note())

    def _note(self) -> None:
        self.evaluations += 1


def steps(grad: str, told: bool, images: Tensor) -> tuple[list[float], list[int]]:
    """Train a fresh model; return the seconds and the evaluations of f of each step."""
    torch.manual_seed(0)
    model = MDEQ.from_preset("tiny", grad=grad, f_solver="broyden_fast")
    if told:
        model.deq.grad_batch_dim = 0
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    counted, seconds, evaluations = Counted(model), [], []
    for _ in range(STEPS):
        before, start = counted.evaluations, time.perf_counter()
        optimizer.zero_grad()
        model(images).square().mean().backward()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
        evaluations.append(counted.evaluations - before)
    return seconds, evaluations


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--grad", nargs="+", default=["ift(max_iter=10, tol=0.5)", "upg"])
    args = parser.parse_args()
    images = torch.randn(args.batch, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    products = len(linearization._words(args.batch)) if args.batch > 1 else 0
    print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads, batch {args.batch}")
    for grad in args.grad:
        steps(grad, True, images)  # warm
        asked, told = [], []
        for _ in range(args.repeats):
            asked.append(steps(grad, False, images))
            told.append(steps(grad, True, images))
        median = [
            [statistics.median(run[0][i] for run in runs) for i in range(STEPS)]
            for runs in (asked, told)
        ]
        more = [a - b for a, b in zip(asked[0][1], told[0][1], strict=True)]
        print(
            f"{grad}: first step {median[0][0] / median[1][0]:.2f}, later "
            f"{median[0][-1] / median[1][-1]:.2f} of the time of one that does not ask; "
            f"evaluations of f more: {more[0]}, then {more[1:]}; products: {products}"
            f"{'' if dpp.get_strategy(grad).tells_samples_apart else ' if it asked'}"
        )


if __name__ == "__main__":
    main()
