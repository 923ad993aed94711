"""Compares a patched recurrent model with the file it was made from, as JSON.

Run in the folder of a patched code base, or of one that `deq-phantom run` patches in memory:

    python looped.py MODEL ORIGINAL CHECK ...   (own first, if it is among them)

ORIGINAL is a checkout as it was. What the original says is by its own code, its settings or its
`detach` changed where a check wants more of the loop in the graph.
"""

import copy
import importlib
import json
import os
import random
import sys
import types
import warnings
from contextlib import nullcontext
from pathlib import Path

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

import deq_phantom_plugin as dpp

SCHEDULE = "schedule({0: 'tbptt(k=1)', 0.5: 'tbptt(k=2)'})"


def original(root, model, without=()):
    """Return the module of the checkout as it was; what it imports are the files here.

    Args:
        root: the checkout.
        model: the model.
        without: texts of the source that are to go.
    """
    path = Path(root, *model.module.split(".")).with_suffix(".py")
    source = path.read_text()
    for text in without:
        assert text in source, text
        source = source.replace(text, "")
    module = types.ModuleType(f"original_{len(sys.modules)}")
    sys.modules[module.__name__] = module
    exec(compile(source, str(path), "exec"), vars(module))
    return module


def built(module, model, dtype="float64", **settings):
    """Return a model all of whose weights are drawn, so that all matter."""
    torch.set_default_dtype(getattr(torch, dtype))
    torch.manual_seed(0)
    made = model.built(module, **settings)
    with torch.no_grad():
        for name, p in made.named_parameters():
            p.normal_(std=0.3).add_(1.0 if "norm" in name else 0.0)
    return made.train()


def trained(model, made, calls=None, **settings):
    """Return the losses of some training calls, and what they leave: gradients, random states."""
    made.zero_grad()
    random.seed(0)
    torch.manual_seed(3)
    losses = []
    for extra in calls or [settings]:
        loss = model.loss(made, **extra)
        loss.backward()
        losses.append(loss.detach())
    grads = {name: p.grad for name, p in made.named_parameters()}
    return losses, grads, (random.getstate(), torch.get_rng_state())


def same(got, want):
    """Whether two trainings are the same, bit for bit."""
    (losses, grads, (drawn, states)), (wanted, others, (python, torchs)) = got, want
    assert any(g is not None and g.abs().sum() > 0 for g in others.values())
    assert grads.keys() == others.keys()
    equal = all(
        (grads[n] is None) == (others[n] is None)
        and (grads[n] is None or torch.equal(grads[n], others[n]))
        for n in others
    )
    alike = drawn == python and torch.equal(states, torchs)
    return alike and equal and all(map(torch.equal, losses, wanted))


def error(grads, others):
    """Return ||got - want|| / ||want|| of all gradients together."""
    zero = torch.zeros(())
    pairs = [(grads[n], others[n]) for n in others]
    pairs = [(zero if a is None else a, zero if b is None else b) for a, b in pairs]
    difference = sum((a - b).square().sum() for a, b in pairs).sqrt()
    return float(difference / sum(b.square().sum() for _, b in pairs).sqrt())


# --- the checks -----------------------------------------------------------------------------------


def check_own(root, model, module):
    """Nothing named: their own training, bit for bit, with their own draws; their checkpoints."""
    theirs_module, found = original(root, model), {}
    for dtype in ("float32", "float64"):
        for name, (settings, calls) in model.variants.items():
            theirs = built(theirs_module, model, dtype, **settings)
            ours = built(module, model, dtype, grad=None, **settings)
            ours.load_state_dict(theirs.state_dict())
            want = trained(model, theirs, copy.deepcopy(calls))
            got = trained(model, ours, copy.deepcopy(calls))
            found[f"{dtype}, {name}"] = same(got, want)
            named = built(module, model, dtype, grad="npg", **settings).eval()
            for mode in (torch.no_grad, torch.inference_mode, nullcontext):
                values = []
                for one in (theirs.eval(), ours.eval(), named):
                    getattr(one, "reset", bool)()
                    random.seed(1), torch.manual_seed(4)
                    with mode():
                        values.append([model.loss(one, **extra) for extra in copy.deepcopy(calls)])
                equal = [all(map(torch.equal, values[0], other)) for other in values[1:]]
                found[f"{dtype}, {name}, {mode.__name__}"] = all(equal)
    return found


def check_unrolled(root, model, module):
    """More of the loop in the graph is their own code, told to."""
    found, grads = {}, {}
    for spec, k in model.unrolled.items():
        ours = trained(model, built(module, model, grad=spec, **model.plain))
        theirs = model.whole(root, k)
        grads[k] = theirs[1]
        found[spec] = error(ours[1], theirs[1]) + float((ours[0][0] - theirs[0][0]).abs())
    first, *rest = grads.values()
    found["tells apart"] = min(error(first, other) for other in rest)
    return found


def check_in_memory(root, model, module):
    """`deq-phantom run --grad SPEC`: the module that was imported is patched."""
    spec, k = [*model.unrolled.items()][1]
    ours = trained(model, built(module, model, **model.plain))
    return {spec: error(ours[1], model.whole(root, k)[1])}


class Given(torch.nn.Module):
    """In place of the loop: the end of a loop by hand, as leaves whose gradient is v.

    Attributes:
        states: the states of that loop; the end is that after the last, or the last.
    """

    def __init__(self, model, made, moves_on):
        super().__init__()
        self.model, self.made, self.moves_on = model, [made], moves_on
        self.seen = model.watched(made)

    is_own = False

    def forward(self, _, start, *args, **kwargs):
        self.func = self.model.map_of(self.made[0], self.seen)
        with torch.no_grad():
            self.at, end = self.model.ends(self.func, start, self.moves_on)
        leaves, structure = tree_flatten(end)
        self.end = [leaf.detach().clone().requires_grad_() for leaf in leaves]
        return tree_unflatten(self.end, structure)

    def add(self, solve):
        """Add to the gradients those through the map, of g = solve(J^T, v)."""
        leaves = [leaf.detach().clone().requires_grad_() for leaf in tree_flatten(self.at)[0]]
        _, structure = tree_flatten(self.at)
        image = tree_flatten(self.func(tree_unflatten(leaves, structure)))[0]
        image = torch.cat([leaf.flatten() for leaf in image])
        rows = [
            torch.cat([g.flatten() for g in torch.autograd.grad(y, leaves, retain_graph=True)])
            for y in image
        ]
        v = [torch.zeros_like(h) if h.grad is None else h.grad for h in self.end]
        g = solve(torch.stack(rows).T, torch.cat([leaf.flatten() for leaf in v]), self.end[0])
        image.backward(g)


def check_implicit(root, model, module):
    """`npg`, `ift`, `exact` and `jfb` are what dense Jacobians say."""

    def neumann(transposed, v, _):
        term = total = v
        for _ in range(3):
            term = transposed @ term
            total = total + term
        return total

    def solved(transposed, v, _):
        return torch.linalg.solve(torch.eye(len(v)) - transposed, v)

    specs = {
        "jfb": (True, lambda transposed, v, _: v),
        "npg(k=4, lam=1.0)": (False, neumann),
        "ift(tol=1e-12, max_iter=300)": (True, solved),
        "exact": (True, solved),
    }
    found, of = {}, {}
    for spec, (moves_on, solve) in {**specs, **model.own_names}.items():
        loss, of[spec], _ = trained(model, built(module, model, grad=spec, **model.plain))
        by_hand = built(module, model, grad="jfb", **model.plain)
        given = Given(model, by_hand, moves_on)
        setattr(by_hand.get_submodule(model.inner), model.seam, given)
        by_hand.zero_grad()
        random.seed(0), torch.manual_seed(3)
        wanted = model.loss(by_hand)
        wanted.backward(retain_graph=True)
        given.add(solve)
        grads = {name: p.grad for name, p in by_hand.named_parameters()}
        found[spec] = error(of[spec], grads) + float((loss[0] - wanted).abs())
    found["tells apart"] = min(error(of["jfb"], of[spec]) for spec in [*specs][1:])
    return found


class Twice(torch.nn.Module):
    """Two calls as one forward pass."""

    def __init__(self, model, made):
        super().__init__()
        self.model, self.made = model, made

    def forward(self, x):
        return self.model.loss(self.made) + self.model.loss(self.made)


def check_tools(root, model, module):
    """Schedules by fractions, monitors and reports, of a named gradient and of their own."""
    made, found = built(module, model, grad=SCHEDULE, **model.plain), {}
    for step, spec in ((0, "tbptt(k=1)"), (10, "tbptt(k=2)")):
        dpp.set_step(made, step, total=20)
        want = trained(model, built(module, model, grad=spec, **model.plain))
        found[f"schedule at {step}"] = error(trained(model, made)[1], want[1])
    for grad in (SCHEDULE, None):
        dpp.set_grad(made, grad)
        logged, twice = [], Twice(model, made)
        with dpp.monitor(twice, lambda numbers, step, to=logged: to.append(numbers), every=1):
            twice(None).backward()
        found[f"monitored, {grad}"] = sorted(logged[0]) if logged else None
        report = dpp.model_report(twice, None, lambda loss: loss, ["tbptt(k=1)", "npg", "ift"])
        found[f"reported, {grad}"] = [
            [r.strategy for r in one.results if r.error is None] for one in report.reports
        ]
    return found


def check_special(root, model, module):
    """What only this repository has."""
    return model.special(root, module)


def check_compiled(root, model, module):
    """Whether it compiles into one graph."""
    return model.compiled(root, module)


def check_configured(root, model, module):
    """What its configuration names."""
    return model.configured(root, module)


def main(name, root, *checks):
    from looped_models import MODELS

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    sys.path.insert(0, os.getcwd())
    model = MODELS[name]
    model.prepare()
    module = importlib.import_module(model.module)
    found = {}
    for check in checks:
        if check != "own":  # their norms and rotations round to less whatever they are given
            torch.Tensor.float = lambda self: self.to(torch.get_default_dtype())
        found[check] = globals()[f"check_{check}"](root, model, module)
    print("RESULT", json.dumps(found))


if __name__ == "__main__":
    sys.modules["looped"] = sys.modules["__main__"]
    main(*sys.argv[1:])
