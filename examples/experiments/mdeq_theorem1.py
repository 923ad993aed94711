"""MDEQ-Tiny on CIFAR-10: the cosines of phantom gradients with the exact one during training.

    python examples/experiments/mdeq_theorem1.py                 # smoke: generated images
    python examples/experiments/mdeq_theorem1.py --size cpu --data cifar10-jpeg.npz

Theorem 1 of the paper gives a condition under which the inner product of a phantom gradient and the
exact gradient is positive. All cosines are measured on test images with the weights of that step,
whichever gradient trains them.
"""

from pathlib import Path

from harness.command import Experiment, main
from harness.results import Column, Curve, best, last
from harness.vision import VisionSettings, VisionTask

UPG = [f"upg(k={k}, lam=0.5)" for k in (1, 3, 5, 9)]
NPG = [f"npg(k={k}, lam=0.5)" for k in (3, 5, 9)]  # npg(k=1) has the direction of upg(k=1)

EXPERIMENT = Experiment(
    Path(__file__),
    VisionSettings,
    VisionTask,
    "MDEQ-Tiny on CIFAR-10: cosines with the exact gradient along training",
    columns=[
        Column("accuracy (%)", last("accuracy", 100)),
        Column("rho", last("report_rho"), "{:.2f}"),
        *(
            Column(f"least of {grad}", best(f"cosine of {grad}", choose=min), "{:.2f}")
            for grad in (*UPG, *NPG)
        ),
        Column("residual of the reference", last("report_residual"), "{:.0e}"),
    ],
    curves=[Curve(f"cosine of {grad}", f"cosine of {grad}") for grad in UPG]
    + [Curve("report_rho", "largest spectral radius of df/dh")],
)

if __name__ == "__main__":
    main(EXPERIMENT)
