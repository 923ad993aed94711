"""Trains looped language models on a text file, with several depths and gradients of the loop.

    python examples/train_looped_lm.py                   # Python's own language reference
    python examples/train_looped_lm.py --text FILE --methods "tbptt(k=4)" "tbptt(k=4)@poisson(8)"
    python examples/train_looped_lm.py --text FILE --resume  # goes on where it was stopped
    python examples/train_looped_lm.py --text FILE --report  # for report_predicts.py

A method is GRAD or GRAD@LOOPS. GRAD is a spec of deq_phantom_plugin. LOOPS is a number or a
distribution: how often the block is repeated in training (8 unless --loops says otherwise). The
model is that of looped_lm.py. For each seed, all methods begin with the same weights, and see the
same batches in the same order. The table shows:

- perplexity per character on the last tenth of the text, with the block repeated 4 to 64 times.
- residual: ||F(h) - h|| / ||F(h)|| at the end of a loop as long as in training. If that length is
  drawn, the loop has its mean length.
- rho: the spectral radius of dF/dh there, as the mean over eight sequences.
- step: the time of a step, divided by that of the first method that trained. The models take the
  same steps in turn, at eight points of training. The time is the mean of the eight medians.
- MiB: the memory that such a step allocates at most.

A run that fails has its error in its row. With --report, the JSON has gradient reports on eight
sequences at the start, after a tenth and at the end (of one draw, if the loops are drawn).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
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
    step_costs,
    train_step,
)

require("transformers", "text")
from experiments.harness.reports import reported  # noqa: E402

from looped_lm import LoopedConfig, LoopedForCausalLM, loops  # noqa: E402

RANDOM = "lognormal_poisson(mean=8, sigma=0.5)"
METHODS = (
    "tbptt(k=4)",
    "tbptt('all')",
    f"tbptt(k=4)@{RANDOM}",
    "ramp('tbptt', {'k': (1, 4)}, until=0.5)",
    "upg(k=4, lam=0.8)",
    "npg(k=4, lam=0.8)",
    "npg(k=4, lam=0.8, clip=1.0)",
    "ift",
)
EVAL_BATCH, RADIUS_BATCH = 32, 8
DIVERGED = 1000  # a perplexity above this is not shown as a number


@dataclass
class Run:
    """The results of a training run so far.

    Attributes:
        method: the method, as it was given.
        seed: the seed of the weights and the batches.
        steps: the number of optimiser steps so far.
        history: the results of each evaluation, with its `step`.
        error: the error that ended the run early, or None.
    """

    method: str
    seed: int
    steps: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    error: str | None = None


# --- training ------------------------------------------------------------------------------------


def parse_method(method: str, default: int | str) -> tuple[str, int | str]:
    """Return the gradient of a method, and how often its block is repeated in training.

    Raises:
        ValueError: if one of them is invalid.
    """
    grad, at, text = (part.strip() for part in method.partition("@"))
    steps: int | str = text if at else default
    if isinstance(steps, str) and steps.isdecimal():
        steps = int(steps)
    dpp.Equilibrium(steps=steps, grad=grad)
    return grad, steps


def make_model(method: str, args: argparse.Namespace, n_tokens: int) -> LoopedForCausalLM:
    """Return a model; the weights are the same for every method."""
    grad, steps = parse_method(method, args.loops)
    torch.manual_seed(args.seed)
    return LoopedForCausalLM(
        LoopedConfig(
            vocab_size=n_tokens,
            hidden_size=args.hidden,
            intermediate_size=2 * args.hidden,
            num_attention_heads=args.heads,
            max_position_embeddings=args.length,
            prelude_layers=args.layers[0],
            block_layers=args.layers[1],
            coda_layers=args.layers[2],
            block_norm=args.block_norm,
            steps=steps,
            grad=grad,
        )
    )


def make_optimizer(model: LoopedForCausalLM, args: argparse.Namespace) -> torch.optim.AdamW:
    """Return the optimiser of a model."""
    return torch.optim.AdamW(model.parameters(), args.lr, betas=(0.9, 0.98), weight_decay=0.01)


def evaluate(model: LoopedForCausalLM, data: Tensor, args: argparse.Namespace) -> dict[str, Any]:
    """Return the validation perplexity by number of loops, the residual and the radius."""
    model.eval()
    count = min(args.eval_sequences, len(data) // args.length)
    sequences = data[: count * args.length].view(count, args.length).to(args.device)
    perplexity = {}
    for steps in args.test_loops:
        with loops(model, steps), torch.no_grad():
            losses = [model(ids, labels=ids).loss * len(ids) for ids in sequences.split(EVAL_BATCH)]
        loss = float(torch.stack(losses).sum()) / count
        perplexity[str(steps)] = math.exp(loss) if loss < 700 else math.inf  # also if it is NaN
    with torch.no_grad():
        func, start = model.recurrence(sequences[:RADIUS_BATCH])
        state = model.equilibrium(func, start)
        image = func(state)
        change = (image - state).flatten(1).norm(dim=1) / image.flatten(1).norm(dim=1)
    radius = dpp.spectral_radius(func, state, batch_dim=0, tol=0.02)
    model.train()
    return {
        "perplexity": perplexity,
        "residual": float(change.mean()),
        "spectral_radius": float(radius.mean()),
    }


def report(
    model: LoopedForCausalLM, step: int, data: Tensor, args: argparse.Namespace
) -> dict[str, Any]:
    """Return what a gradient report says of the model's own gradient, see `reported`."""
    ids = data.unfold(0, args.length, args.length)[:RADIUS_BATCH].to(args.device)
    dpp.set_step(model, step, total=args.steps)  # of schedules and ramps
    own, inputs = model.config.grad, {"input_ids": ids, "labels": ids}
    return reported(model, own, inputs, lambda out: out.loss, [own])


def train(
    run: Run,
    data: tuple[Tensor, Tensor],
    args: argparse.Namespace,
    n_tokens: int,
    progress: Callable[[int, str], Any],
) -> None:
    """Train one method from its last checkpoint to the end, and fill in its run."""
    args = of_seed(args, run.seed)
    model = make_model(run.method, args, n_tokens).to(args.device).train()
    optimizer = make_optimizer(model, args)
    folder = folder_of(run, args)
    if args.resume and (folder / "checkpoint.pt").is_file():
        restore(folder / "checkpoint.pt", run, model, optimizer, args)
    progress(run.steps, run.method)
    reports = (0, max(1, args.steps // 10), args.steps) if args.report else ()
    if run.steps in reports and not run.history:
        run.history.append({"step": 0, **report(model, 0, data[1], args)})
    while run.steps < args.steps:
        ids = batch_at(data[0], run.steps, args).to(args.device)
        output = train_step(model, optimizer, ids, run.steps, args)
        run.steps += 1
        progress(1, run.method)
        found = report(model, run.steps, data[1], args) if run.steps in reports else {}
        is_evaluated = run.steps % args.eval_every == 0 or run.steps == args.steps
        if is_evaluated:
            found |= {"train_loss": output.loss.item(), **evaluate(model, data[1], args)}
        if found:
            run.history.append({"step": run.steps, **found})
        if is_evaluated:
            save_checkpoint(folder / "checkpoint.pt", run, model, optimizer, args)
    model.save_pretrained(folder)


def of_seed(args: argparse.Namespace, seed: int) -> argparse.Namespace:
    """Return the arguments with one seed in place of all seeds."""
    return argparse.Namespace(**vars(args), seed=seed)


def folder_of(run: Run, args: argparse.Namespace) -> Path:
    """Return the folder of a run."""
    return Path(args.out, slug(run.method), f"seed_{run.seed}")


def trained_model(run: Run, args: argparse.Namespace) -> tuple[Any, Any]:
    """Return a saved model, and an optimiser by which it can be trained on."""
    model = LoopedForCausalLM.from_pretrained(folder_of(run, args)).to(args.device).train()
    return model, make_optimizer(model, args)


# --- results -------------------------------------------------------------------------------------


def groups(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Return the runs of each method."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run.method, []).append(run)
    return found


def values(runs: Sequence[Run], key: str, loops: int | None = None) -> list[float]:
    """Return the last value of a key in each run that did not fail.

    Args:
        runs: the runs.
        key: the key in the history.
        loops: the number of loops, if the value is a perplexity; None otherwise.
    """
    last = [run.history[-1][key] for run in runs if run.history and run.error is None]
    return [float(value if loops is None else value[str(loops)]) for value in last]


def table(
    runs: Sequence[Run], found: dict[str, Any], args: argparse.Namespace
) -> tuple[list[str], list[list[str]]]:
    """Return a header, and one row per method with means and deviations over the seeds."""
    header = ["method", *map(str, args.test_loops), "residual", "rho", "step", "MiB", "runs"]
    rows, first = [], next(iter(found.values()), None)
    for method, own in groups(runs).items():
        row = [method]
        for steps in args.test_loops:
            row.append(_mean_and_deviation(values(own, "perplexity", steps)))
        row.append(f"{_mean(values(own, 'residual')):.1e}")
        row.append(f"{_mean(values(own, 'spectral_radius')):.2f}")
        cost = found.get(method)
        row.append(f"{cost['seconds'] / first['seconds']:.2f}" if cost and first else "nan")
        row.append(f"{cost['bytes'] / 2**20:.1f}" if cost else "nan")
        failed = [f"seed {run.seed}, step {run.steps}: {run.error}" for run in own if run.error]
        row.append(f"{len(own) - len(failed)}" + "".join(f"; {error}" for error in failed))
        rows.append(row)
    return header, rows


def _mean(numbers: Sequence[float]) -> float:
    return statistics.fmean(numbers) if numbers else math.nan


def _mean_and_deviation(numbers: Sequence[float]) -> str:
    mean = _mean(numbers)
    if not mean < DIVERGED:
        return "nan" if math.isnan(mean) else f">{DIVERGED}"
    return f"{mean:.2f}" + (f" ± {statistics.pstdev(numbers):.2f}" if len(numbers) > 1 else "")


def save(
    runs: Sequence[Run], found: dict[str, Any], args: argparse.Namespace, n_tokens: int
) -> None:
    """Write the results so far: all as JSON, one row per run as CSV, and perplexity as PNG."""
    shared = {**settings(args), "seeds": args.seeds, "characters": n_tokens}
    content = {"settings": shared, "runs": [asdict(run) for run in runs], "costs": found}
    name = args.out / args.name
    write_whole(f"{name}.json", json.dumps(finite(content), indent=1).encode())
    perplexities = [f"perplexity at {steps}" for steps in args.test_loops]
    names = ["train loss", "residual", "rho", "ms/step", "MiB", "steps"]
    rows = [["method", "seed", *perplexities, *names]]
    for run in runs:
        last = next((row for row in run.history[::-1] if "perplexity" in row), {"perplexity": {}})
        numbers = [last["perplexity"].get(str(steps), math.nan) for steps in args.test_loops]
        cells = [f"{number:.5g}" for number in (*numbers, last.get("train_loss", math.nan))]
        cells.append(f"{last.get('residual', math.nan):.1e}")
        cells.append(f"{last.get('spectral_radius', math.nan):.3f}")
        cost = found.get(run.method, {"seconds": math.nan, "bytes": math.nan})
        cells += [f"{1e3 * cost['seconds']:.1f}", f"{cost['bytes'] / 2**20:.1f}"]
        steps = str(run.steps) if run.error is None else f"{run.steps}: {run.error}"
        rows.append([run.method, str(run.seed), *cells, steps])
    write_whole(f"{name}.csv", as_csv(rows))
    write_whole(f"{name}.png", plot(runs, args))


def plot(runs: Sequence[Run], args: argparse.Namespace) -> bytes:
    """Return a PNG of the perplexity over the loops at test time.

    A line is the mean over the seeds, and a band reaches from the lowest to the highest seed.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    figure = blank_figure(9.5, 4.2)
    axes = figure.add_subplot()
    found = {
        method: [values(own, "perplexity", steps) for steps in args.test_loops]
        for method, own in groups(runs).items()
        if values(own, "spectral_radius")  # empty if all seeds have failed
    }
    means = {m: [statistics.fmean(numbers) for numbers in by] for m, by in found.items()}
    lowest = min((mean for by in means.values() for mean in by), default=1.0)
    top = 1.4 * lowest  # a run that fails must not flatten the others
    for number, (method, by_loops) in enumerate(found.items()):
        style, color = "--" if "@" in method else "-", f"C{number % 10}"
        label = method if min(means[method]) < top else f"{method}: above"
        axes.plot(args.test_loops, means[method], style, marker=".", color=color, label=label)
        low, high = ([pick(numbers) for numbers in by_loops] for pick in (min, max))
        axes.fill_between(args.test_loops, low, high, color=color, alpha=0.15, linewidth=0)
    axes.set_ylim(0.98 * lowest, top)
    axes.set(xlabel="loops at test time", ylabel="validation perplexity (characters)")
    axes.set_xscale("log", base=2)
    axes.set_xticks(args.test_loops, [str(steps) for steps in args.test_loops])
    if found:
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return as_png(figure)


# --- the command line ----------------------------------------------------------------------------


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the checked arguments of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, name="looped_lm", steps=1200, lr=6e-3, eval_every=600)
    add = parser.add_argument
    add("--methods", nargs="+", default=list(METHODS), metavar="METHOD")
    add("--loops", default="8", help="loops in training: a number or a distribution (8)")
    add("--test-loops", nargs="+", type=int, default=[4, 8, 16, 32, 64], metavar="N")
    add("--layers", nargs=3, type=int, default=[1, 1, 1], help="of prelude, block, coda (1 1 1)")
    add("--block-norm", action="store_true", help="normalise at the block's end too, as Huginn")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of weights and batches (0 1 2)")
    add("--report", action="store_true", help="make gradient reports along the training")
    args = parsed(parser, argv, "looped_lm")
    if min(*args.test_loops, *args.layers) < 1:
        parser.error("expected test-loops and layers above 0")
    args.test_loops = sorted(set(args.test_loops))
    try:  # fail now, not after the hour of the first method
        for method in args.methods:
            make_model(method, of_seed(args, 0), 1)
    except ValueError as error:
        parser.error(str(error))
    return args


def main(argv: Sequence[str] | None = None) -> list[Run]:
    """Train every method with every seed, save the results after each run, and print the table.

    All methods of a seed come before the next seed, so early results compare all methods.
    """
    args = parse(argv)
    training, validation, characters = split(args.text, args.length)
    # A loop that ends far from an equilibrium is a normal result; the table shows its residual.
    warnings.simplefilter("ignore", dpp.ConvergenceWarning)
    runs: list[Run] = []
    total = args.steps * len(args.methods) * len(args.seeds)
    with progress_bar(total) as (_, progress):
        for seed in args.seeds:
            for method in args.methods:
                runs.append(run := Run(method, seed))
                try:
                    train(run, (training, validation), args, len(characters), progress)
                except (ArithmeticError, RuntimeError, ValueError) as error:
                    run.error = f"{type(error).__name__}: {error}"
                save(runs, {}, args, len(characters))
    trained = groups([run for run in runs if run.error is None])
    models = {method: trained_model(own[0], args) for method, own in trained.items()}
    found = step_costs(models, training, of_seed(args, args.seeds[0]))
    save(runs, found, args, len(characters))
    print(text_table(*table(runs, found, args)))
    return runs


if __name__ == "__main__":
    main()
