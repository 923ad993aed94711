"""Makes the figures of the documentation that show gradient reports.

    python examples/report_figures.py

The script trains an MDEQ-tiny on scikit-learn's digits, and writes the text and the three figures
of its report. Then it writes the damped radii of two linear maps. The Jacobians of both have a
spectral radius of 1.4, one from a negative eigenvalue and one from a positive eigenvalue. Times in
the report are those of the machine. Needed: `pip install "deq-phantom-plugin[vision,viz]"`.
"""

from __future__ import annotations

import argparse
import base64
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import deq_phantom_plugin as dpp
from deq_phantom_plugin._plumbing.output import write_whole
from deq_phantom_plugin.adapters.mdeq import MDEQ
from deq_phantom_plugin.compare import load_digits
from deq_phantom_plugin.diagnostics import GradientReport, ModelReport

GRADS = ("ift", "upg", "npg", "npg(k=15)", "jfb")
FIGURES = ("errors", "radii", "memory")  # in the order of the HTML page of a report
BATCH = 64


def trained(steps: int) -> tuple[nn.Module, Tensor, Tensor]:
    """Return an MDEQ-tiny after so many training steps, and a batch of test images and labels."""
    torch.manual_seed(0)
    data = load_digits()
    model = MDEQ.from_preset("tiny", in_channels=1, f_solver="broyden_fast")
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(steps):
        chosen = torch.randint(len(data.train_labels), (BATCH,))
        loss = F.cross_entropy(model(data.train_images[chosen]), data.train_labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model, data.test_images[:BATCH], data.test_labels[:BATCH]


def linear_map(leading: float) -> GradientReport:
    """Return the report on h = W h + u for a symmetric W.

    Args:
        leading: the leading eigenvalue of W. The other eigenvalues lie between -0.5 and 0.5.
    """
    generator = torch.Generator().manual_seed(0)
    others = torch.linspace(-0.5, 0.5, 15, dtype=torch.float64)
    eigenvalues = torch.cat([others, torch.tensor([leading], dtype=torch.float64)])
    noise = torch.randn(16, 16, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(noise).Q
    weight = (basis @ torch.diag(eigenvalues) @ basis.mT).requires_grad_()
    u = torch.randn(8, 16, generator=generator, dtype=torch.float64)
    h = torch.linalg.solve(torch.eye(16, dtype=torch.float64) - weight.detach(), u.mT).mT
    return dpp.gradient_report(
        lambda h: h @ weight + u, h, lambda h: h.square().mean(), [weight], ["ift", "npg", "jfb"]
    )


def images(report: GradientReport | ModelReport) -> list[bytes]:
    """Return the figures of a report's HTML page as SVG files."""
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder, "report.html")
        report.save_html(page)
        found = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', page.read_text())
    return [base64.b64decode(data) for data in found]


def main(argv: Sequence[str] | None = None) -> None:
    """Write the figures.

    Args:
        argv: the arguments; those of the process if None.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=130, help="training steps of the model")
    parser.add_argument("--out", type=Path, default=Path("docs/images"), help="folder for results")
    args = parser.parse_args(argv)
    model, x, labels = trained(args.steps)
    report = dpp.model_report(model, x, lambda logits: F.cross_entropy(logits, labels), GRADS)
    print(report)
    write_whole(args.out / "report.txt", f"{report}\n".encode())
    for name, image in zip(FIGURES, images(report), strict=True):
        write_whole(args.out / f"report_{name}.svg", image)
    for name, leading in (("negative", -1.4), ("positive", 1.4)):
        alone = linear_map(leading)
        print(f"\n{alone}")
        radii = images(alone)[FIGURES.index("radii")]
        write_whole(args.out / f"radius_{name}.svg", radii)


if __name__ == "__main__":
    main()
