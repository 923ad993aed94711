"""Trains deep equilibrium language models on a text file with several gradients.

    python examples/train_lm.py                        # Python's own language reference
    python examples/train_lm.py --text FILE --methods ift upg upg+jr npg npg+jr=0.1
    python examples/train_lm.py --text FILE --resume   # goes on where it was stopped

A method is a spec of deq_phantom_plugin. "+jr" adds Jacobian regularisation, with the weight
--jac-reg-weight or with the weight after "=". All methods begin with the same weights, and see the
same batches in the same order. A token is a character. The perplexity is that per character on the
last tenth of the text. The spectral radius is that of the Jacobian dF/dh at the equilibrium, as the
mean over eight validation sequences.

If a run fails, its row shows the error, and the other runs go on. Each model is saved for
`AutoModelForCausalLM.from_pretrained` (import deq_phantom_plugin.adapters.transformer first).
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

import deq_phantom_plugin as dpp
from deq_phantom_plugin._plumbing.extras import require
from deq_phantom_plugin._plumbing.output import text_table, write_whole
from language import (
    add_arguments,
    as_csv,
    as_png,
    batch_at,
    blank_figure,
    finite,
    parsed,
    progress_bar,
    restore,
    save_checkpoint,
    settings,
    slug,
    split,
    train_step,
)

require("transformers", "text")
from deq_phantom_plugin.adapters.transformer import (  # noqa: E402
    DEQTransformerConfig,
    DEQTransformerForCausalLM,
)

EVAL_BATCH, RADIUS_BATCH = 32, 8


@dataclass
class Run:
    """The results of a training run so far.

    Attributes:
        method: the method, as it was given.
        steps: the number of optimiser steps so far.
        seconds: the seconds of each step.
        history: the results of each evaluation, with its `step`.
        error: the error that ended the run early, or None.
    """

    method: str
    steps: int = 0
    seconds: list[float] = field(default_factory=list)
    history: list[dict[str, float]] = field(default_factory=list)
    error: str | None = None


# --- training ------------------------------------------------------------------------------------


def parse_method(method: str, default_weight: float) -> tuple[str, float]:
    """Return the spec of a method and the weight of its regulariser, 0 for none.

    Raises:
        ValueError: if the spec or the weight is invalid.
    """
    spec, jr, weight = method.partition("+jr")
    if jr and weight and not re.fullmatch(r"=\d+(\.\d*)?", weight):
        raise ValueError(f"{method!r}; expected +jr, or +jr=WEIGHT such as +jr=0.1")
    dpp.get_strategy(spec)
    return spec, (float(weight[1:]) if weight else default_weight) if jr else 0.0


def make_model(method: str, args: argparse.Namespace, n_tokens: int) -> DEQTransformerForCausalLM:
    """Return a model; the weights are the same for every method."""
    spec, weight = parse_method(method, args.jac_reg_weight)
    torch.manual_seed(args.seed)
    return DEQTransformerForCausalLM(
        DEQTransformerConfig(
            vocab_size=n_tokens,
            hidden_size=args.hidden,
            intermediate_size=4 * args.hidden,
            num_attention_heads=args.heads,
            max_position_embeddings=args.length,
            pre_layer_norm=args.pre_layer_norm,
            dropout=args.dropout,
            grad=spec,
            f_solver=args.f_solver,
            f_max_iter=args.f_max_iter,
            f_tol=args.f_tol,
            jac_reg_weight=weight,
            jac_reg_freq=args.jac_reg_freq,
        )
    )


def evaluate(model: Any, data: Tensor, args: argparse.Namespace) -> dict[str, float]:
    """Return the perplexity, the spectral radius, the residual and the evaluations of F.

    All are measured on validation sequences.
    """
    model.eval()
    count = min(args.eval_sequences, len(data) // args.length)
    sequences = data[: count * args.length].view(count, args.length).to(args.device)
    losses, residuals, nfe = [], [], []
    with torch.no_grad():
        for ids in sequences.split(EVAL_BATCH):
            output = model(ids, labels=ids, use_cache=False)
            losses.append(output.loss * len(ids))
            residuals.append(output.equilibrium_info.residual)
            nfe.append(output.equilibrium_info.nfe)
    loss = float(torch.stack(losses).sum()) / count
    radius = model.spectral_radius(sequences[:RADIUS_BATCH], tol=0.02, max_iter=60)
    model.train()
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "spectral_radius": float(radius.mean()),
        "residual": float(torch.cat(residuals).mean()),
        "nfe": float(torch.stack(nfe).double().mean()),
    }


def train(
    run: Run,
    data: tuple[Tensor, Tensor],
    args: argparse.Namespace,
    n_tokens: int,
    progress: Callable[[int, str], Any],
) -> Any:
    """Train one method from its last checkpoint to the end, and fill in its run.

    Args:
        run: the results so far.
        data: the training text and the validation text.
        args: the arguments of the command.
        n_tokens: the number of different characters.
        progress: is called with a number of steps and the method.

    Returns:
        The trained model.
    """
    training, validation = data
    model = make_model(run.method, args, n_tokens).to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, betas=(0.9, 0.98), weight_decay=0.01)
    folder = args.out / slug(run.method)
    if args.resume and (folder / "checkpoint.pt").is_file():
        restore(folder / "checkpoint.pt", run, model, optimizer, args)
    progress(run.steps, run.method)
    if not run.history:
        run.history.append({"step": 0, **evaluate(model, validation, args)})
    while run.steps < args.steps:
        ids = batch_at(training, run.steps, args).to(args.device)
        begin = time.perf_counter()
        output = train_step(model, optimizer, ids, run.steps, args)
        if args.device.startswith("cuda"):
            torch.cuda.synchronize()
        run.seconds.append(time.perf_counter() - begin)
        run.steps += 1
        progress(1, run.method)
        if run.steps % args.eval_every == 0 or run.steps == args.steps:
            found = evaluate(model, validation, args)
            jac = 0.0 if output.jac_loss is None else output.jac_loss.item()
            found["train_loss"] = output.loss.item() - jac
            run.history.append({"step": run.steps, **found})
            save_checkpoint(folder / "checkpoint.pt", run, model, optimizer, args)
    model.save_pretrained(folder)
    return model


# --- results -------------------------------------------------------------------------------------

HEADER = [
    "method",
    "perplexity",
    "best",
    "train loss",
    "ms/step",
    "rho",
    "residual",
    "nfe",
    "steps",
]


def rows(runs: Sequence[Run]) -> list[list[str]]:
    """Return one row per run, with its last evaluation and its error if there is one."""
    table = []
    for run in runs:
        last = run.history[-1] if run.history else {}
        best = min((h["perplexity"] for h in run.history), default=math.nan)
        table.append(
            [
                run.method,
                f"{last.get('perplexity', math.nan):.3f}",
                f"{best:.3f}",
                f"{last.get('train_loss', math.nan):.3f}",
                f"{1e3 * statistics.median(run.seconds):.1f}" if run.seconds else "nan",
                f"{last.get('spectral_radius', math.nan):.3f}",
                f"{last.get('residual', math.nan):.1e}",
                f"{last.get('nfe', math.nan):.1f}",
                str(run.steps) if run.error is None else f"{run.steps}: {run.error}",
            ]
        )
    return table


def save(args: argparse.Namespace, runs: Sequence[Run]) -> None:
    """Write the results so far: numbers as JSON, the table as CSV, and curves as PNG."""
    content = {"settings": settings(args), "runs": [asdict(run) for run in runs]}
    write_whole(args.out / f"{args.name}.json", json.dumps(finite(content), indent=1).encode())
    write_whole(args.out / f"{args.name}.csv", as_csv([HEADER, *rows(runs)]))
    write_whole(args.out / f"{args.name}.png", plot(runs))


def plot(runs: Sequence[Run]) -> bytes:
    """Return a PNG of validation perplexity and spectral radius over the steps.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    figure = blank_figure(11, 4)
    perplexity, radius = figure.subplots(1, 2)
    for number, run in enumerate(runs):
        style = "--" if "+jr" in run.method else "-"
        for axes, key in ((perplexity, "perplexity"), (radius, "spectral_radius")):
            points = [(h["step"], h[key]) for h in run.history if h["step"] or axes is radius]
            if points:
                steps, values = zip(*points, strict=True)
                axes.plot(steps, values, style, color=f"C{number}", label=run.method)
                if run.error is not None:
                    axes.plot(steps[-1], values[-1], "x", color=f"C{number}")
    perplexity.set(xlabel="step", ylabel="validation perplexity (characters)", yscale="log")
    lowest = min((h["perplexity"] for run in runs for h in run.history), default=1.0)
    if perplexity.get_ylim()[1] > 5 * lowest:  # a run that fails must not flatten the others
        perplexity.set_ylim(0.9 * lowest, 5 * lowest)
    radius.axhline(1, color="0.7", linewidth=0.8)
    radius.set(xlabel="step", ylabel="spectral radius of dF/dh", yscale="log")
    radius.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return as_png(figure)


# --- the command line ----------------------------------------------------------------------------


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the checked arguments of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, name="lm", steps=1000, lr=2e-3, eval_every=100)
    add = parser.add_argument
    add("--methods", nargs="+", default=["ift", "upg", "npg"], metavar="METHOD")
    add("--pre-layer-norm", action="store_true", help="the source's PreLN in place of PostLN")
    add("--dropout", type=float, default=0.0, help="probability (0)")
    add("--f-solver", default="anderson", help="forward solver (anderson)")
    add("--f-max-iter", type=int, default=20, help="its most iterations (20)")
    add("--f-tol", type=float, default=1e-3, help="its tolerance (1e-3)")
    add("--jac-reg-weight", type=float, default=2.0, help="of +jr (2.0, the source's)")
    add("--jac-reg-freq", type=float, default=0.4, help="part of the steps that have it (0.4)")
    add("--seed", type=int, default=0, help="of weights and batches (0)")
    add("--prompt", help="a text that each model continues when it is trained")
    args = parsed(parser, argv, "lm")
    try:  # fail now, not after the hour of the first method
        for method in args.methods:
            make_model(method, args, 1)
    except ValueError as error:
        parser.error(str(error))
    return args


def main(argv: Sequence[str] | None = None) -> list[Run]:
    """Train every method, save the results after each, and print the table."""
    args = parse(argv)
    training, validation, characters = split(args.text, args.length)
    # A solve that stops at f_max_iter is a normal result; the table shows its residual.
    warnings.simplefilter("ignore", dpp.ConvergenceWarning)
    runs: list[Run] = []
    with progress_bar(args.steps * len(args.methods)) as (bar, progress):
        for method in args.methods:
            runs.append(run := Run(method))
            try:
                model = train(run, (training, validation), args, len(characters), progress)
                if args.prompt:
                    bar.write(f"--- {method}\n{continued(model, args, characters)}")
            except (ArithmeticError, RuntimeError, ValueError) as error:
                run.error = f"{type(error).__name__}: {error}"
            save(args, runs)
    print(text_table(HEADER, rows(runs)))
    return runs


def continued(model: Any, args: argparse.Namespace, characters: list[str]) -> str:
    """Return the prompt with the text by which the model continues it."""
    known = [characters.index(c) for c in args.prompt if c in characters][: args.length - 1]
    ids = torch.tensor([known], device=args.device)
    torch.manual_seed(args.seed)
    length = model.config.max_position_embeddings
    found = model.eval().generate(ids, max_length=length, do_sample=True)
    return "".join(characters[i] for i in found[0].tolist())


if __name__ == "__main__":
    main()
