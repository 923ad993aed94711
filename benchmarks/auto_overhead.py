"""Measures what `auto` costs, in comparison with the strategy that it chooses.

    python benchmarks/auto_overhead.py

The script trains MDEQ-tiny on scikit-learn's digits, with a given number of forward evaluations.
Two models have the same weights. One takes a step with `auto`, and then the other takes the same
step with the strategy that is in force. The script prints the choices, and the ratio of the seconds
of all steps. The steps in which `auto` measures are included.
"""

from __future__ import annotations

import argparse
import copy

import torch
from torch.nn import functional as F

import deq_phantom_plugin as dpp
from deq_phantom_plugin._plumbing.output import text_table
from deq_phantom_plugin.adapters.mdeq import MDEQ
from deq_phantom_plugin.compare import load_digits
from deq_phantom_plugin.diagnostics.measure.cost import now


class Pair:
    """A model that trains with `auto`, and a twin that takes the same steps without it.

    Args:
        grad: the spec of `auto`.
        evaluations: the number of evaluations of the forward solve.
        device: the device of both models.
    """

    def __init__(self, grad: str, evaluations: int, device: torch.device) -> None:
        self.data, self.device = load_digits(), device
        torch.manual_seed(0)
        self.model = MDEQ.from_preset(
            "tiny",
            in_channels=self.data.train_images.shape[1],
            grad=grad,
            f_solver="anderson",
            f_max_iter=evaluations,
            f_tol=0.0,
        ).to(device)
        self.twin = copy.deepcopy(self.model)
        self.optimizer = torch.optim.Adam(self.model.parameters(), 3e-3)

    def step(self, number: int, batch_size: int) -> tuple[float, float, str]:
        """Train one step.

        Returns:
            The seconds with `auto`, the seconds of the twin, and the spec in force after the step.
        """
        chosen = torch.randint(len(self.data.train_labels), (batch_size,))
        images = self.data.train_images[chosen].to(self.device)
        labels = self.data.train_labels[chosen].to(self.device)
        own = self._timed(self.model, number, images, labels)
        spec = dpp.report_choice(self.model)[-1].spec
        weights = self.model.state_dict()
        dpp.set_grad(self.twin, spec)
        other = self._timed(self.twin, number, images, labels)
        self.optimizer.step()
        self.twin.load_state_dict(weights)
        return own, other, spec

    def _timed(self, model: MDEQ, number: int, images: torch.Tensor, labels: torch.Tensor) -> float:
        dpp.set_step(model, number)
        start = now(self.device)
        model.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        return now(self.device) - start


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--grad", default="auto")
    parser.add_argument("--evaluations", nargs="+", type=int, default=[22, 6])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    args = parser.parse_args()
    rows = []
    for evaluations in args.evaluations:
        pair = Pair(args.grad, evaluations, args.device)
        steps = [pair.step(number, args.batch_size) for number in range(args.steps)]
        own, other = (sum(step[i] for step in steps[1:]) for i in (0, 1))
        rows.append([str(evaluations), f"{own / other:.3f}", steps[-1][2]])
        print(dpp.report_choice(pair.model), flush=True)
    print(text_table(["evaluations", "seconds, ratio", "settled on"], rows))


if __name__ == "__main__":
    main()
