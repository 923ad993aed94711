"""Compares a patched recursive model with the file it was made from, as JSON.

Run in the folder of a patched code base, or of one that `deq-phantom run` patches in memory:

    python recursive.py MODEL ORIGINAL CHECK

ORIGINAL is a checkout as it was. What the original says is by its own code, its `no_grad` taken
away where a check wants more of the loop in the graph.
"""

import contextlib
import importlib
import json
import os
import sys
import types
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

import deq_phantom_plugin as dpp
from deq_phantom_plugin.patching import compat

H_CYCLES, L_CYCLES = 3, 2
CONFIG = {
    "batch_size": 2,
    "seq_len": 4,
    "vocab_size": 5,
    "puzzle_emb_ndim": 4,
    "puzzle_emb_len": 1,
    "num_puzzle_identifiers": 3,
    "H_cycles": H_CYCLES,
    "L_cycles": L_CYCLES,
    "H_layers": 1,
    "L_layers": 1,
    "num_layers": 2,
    "hidden_size": 4,
    "expansion": 1,
    "num_heads": 2,
    "pos_encodings": "rope",
    "halt_max_steps": 4,
    "loops": 4,
    "halt_exploration_prob": 0.1,
    "no_ACT_continue": True,
}


# --- one evaluation, written out ------------------------------------------------------------------


def of_two(inner, x, seq, start):
    def func(z_H, z_L):
        for _ in range(L_CYCLES):
            z_L = inner.L_level(z_L, z_H + x, **seq)
        return inner.L_level(z_H, z_L, **seq), z_L

    return func


def of_one(inner, x, seq, start):
    def func(z):
        for _ in range(L_CYCLES):
            z = inner.L_level(z + x, **seq)
        return (inner.L_level(z, **seq),)

    return func


def of_six(inner, x, seq, start):
    """Of which a cycle changes the first L_CYCLES; the others are as a reset made them."""
    first = [getattr(inner, f"L{i}_init").expand_as(start[0]) for i in range(L_CYCLES + 1, 7)]

    def func(z_H, *latents):
        latents = [*latents]
        for i in range(L_CYCLES):
            latents[i] = inner.L_level(sum(latents[1:], latents[0]) + sum(first), z_H + x, **seq)
        return inner.L_level(z_H, sum(latents) + sum(first), **seq), *latents

    return func


def of_layers(inner, x, seq, start):
    def func(h):
        for _ in range(L_CYCLES):
            h = h + x
            for layer in inner.layers:
                h = layer(hidden_states=h, **seq)
        return (h,)

    return func


def of_hrm(inner, x, seq, start):
    """The pair that carries the graph."""

    def func(z_H, z_L):
        z_L = inner.L_level(z_L, z_H + x, **seq)
        return inner.H_level(z_H, z_L, **seq), z_L

    return func


@dataclass(frozen=True)
class Model:
    """A model: its module and class, one evaluation, and how often a level runs in the loop."""

    module: str
    name: str
    func: object
    calls: int = L_CYCLES + 1  # of `level` in one evaluation
    level: str = "L_level"

    @property
    def is_hrm(self):
        return self.func is of_hrm


_TRM, _HRM = "TinyRecursiveReasoningModel_ACTV1", "HierarchicalReasoningModel_ACTV1"
MODELS = {
    "trm": Model("models.recursive_reasoning.trm", _TRM, of_two),
    "trm_singlez": Model("models.recursive_reasoning.trm_singlez", _TRM, of_one),
    "trm_hier6": Model("models.recursive_reasoning.trm_hier6", _TRM, of_six),
    "trm_hrm": Model("models.recursive_reasoning.hrm", _HRM, of_hrm, 1),
    "eqr": Model("models.eqr", "EqRModel", of_two),
    "eqr_trm": Model("models.trm", "TRMModel", of_two),
    "urm": Model("models.urm.urm", "URM", of_layers, L_CYCLES, "layers.1"),
    "urm_trm": Model("models.trm.trm", "TRM", of_two),
    "urm_hrm": Model("models.hrm.hrm_act_v1", _HRM, of_hrm, 1),
    "hrm": Model("models.hrm.hrm_act_v1", _HRM, of_hrm, 1),
}


# --- models and what they are trained on ----------------------------------------------------------


def batch():
    torch.manual_seed(1)
    return {
        "inputs": torch.randint(0, 5, (2, 4)),
        "labels": torch.randint(0, 5, (2, 4)),
        "puzzle_identifiers": torch.tensor([1, 2], dtype=torch.int32),
    }


def built(module, model, dtype, **settings):
    """Return a model with the loss of its repository; all weights are drawn, so that all matter."""
    from models.losses import ACTLossHead

    torch.set_default_dtype(torch.float64 if dtype == "float64" else torch.float32)
    torch.manual_seed(0)
    made = getattr(module, model.name)({**CONFIG, "forward_dtype": dtype, **settings})
    with torch.no_grad():
        made.inner.q_head.weight.normal_(std=0.3)
    return ACTLossHead(made, loss_type="stablemax_cross_entropy").train()


def steps_of(head, number=2):
    """Yield the losses of supervision steps, which carry the state on."""
    torch.manual_seed(2)
    data = batch()
    carry = head.initial_carry(data)
    for _ in range(number):
        carry, loss, *_ = head(return_keys=[], carry=carry, batch=data)
        yield loss


def trained(head, number=2):
    """Return losses, and the gradients of all that is learned."""
    for p in learned(head).values():
        p.grad = None
    losses = []
    for loss in steps_of(head, number):
        loss.backward()
        losses.append(loss.detach())
    return losses, gradients(head)


def gradients(head):
    return {name: p.grad for name, p in learned(head).items()}


def learned(head):
    """Return what is learned, by name: puzzle embeddings are a buffer."""
    tensors = {**dict(head.named_parameters()), **dict(head.named_buffers())}
    return {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}


def same(got, want):
    (losses, grads), (wanted, others) = got, want
    assert grads.keys() == others.keys()
    assert any(g is not None and g.abs().sum() > 0 for g in others.values())
    return all(map(torch.equal, losses, wanted)) and all(
        (grads[name] is None and others[name] is None) or torch.equal(grads[name], others[name])
        for name in others
    )


def error(grads, others):
    """Return ||got - want|| / ||want|| of all gradients together."""
    zero = torch.zeros(())
    pairs = [(grads[n], others[n]) for n in others]
    pairs = [(zero if a is None else a, zero if b is None else b) for a, b in pairs]
    difference = sum((a - b).square().sum() for a, b in pairs).sqrt()
    return float(difference / sum(b.square().sum() for _, b in pairs).sqrt())


def loaded_original(root, model, optimize=0):
    """Return the module of the checkout as it was; what it imports are the files here."""
    path = Path(root, *model.module.split(".")).with_suffix(".py")
    module = types.ModuleType(f"original_{optimize}")
    sys.modules[module.__name__] = module
    exec(compile(path.read_bytes(), str(path), "exec", optimize=optimize), vars(module))
    return module


class WithoutNoGrad:
    """`torch`, for a module whose `no_grad` is to do nothing."""

    no_grad = contextlib.nullcontext

    def __getattr__(self, name):
        return getattr(torch, name)


def unrolled(root, model, k, **settings):
    """Train the original with its last k evaluations in the graph; earlier ones are cut off."""
    # HRM asserts that its states have no graph.
    module = loaded_original(root, model, optimize=1)
    head = built(module, model, "float64", **settings)
    inner = head.model.inner
    forward = type(inner).forward

    def without(self, *args):
        if not torch.is_grad_enabled():  # HRM's target of Q
            return forward(self, *args)
        evaluations = H_CYCLES * (L_CYCLES if model.is_hrm else 1) - k
        cut = {inner.get_submodule(model.level): evaluations * model.calls}
        if model.is_hrm:
            cut[inner.H_level] = evaluations // L_CYCLES
        hooks = [level.register_forward_hook(detached(n)) for level, n in cut.items()]
        module.torch = WithoutNoGrad()
        try:
            return forward(self, *args)
        finally:
            module.torch = torch
            for hook in hooks:
                hook.remove()

    type(inner).forward = without
    return trained(head)


def detached(number):
    """Return a hook that detaches the first results of a module."""
    calls = []

    def hook(module, args, output):
        calls.append(1)
        return output.detach() if len(calls) <= number else output

    return hook


# --- the checks -----------------------------------------------------------------------------------


def check_own(root, model, module):
    """Nothing named: their own training, bit for bit; their checkpoints load."""
    original, found = loaded_original(root, model), {}
    for dtype in ("float32", "float64", "bfloat16"):
        theirs, ours = (built(m, model, dtype, grad=None) for m in (original, module))
        ours.load_state_dict(theirs.state_dict())
        found[dtype] = same(trained(ours), trained(theirs))
        theirs.eval(), ours.eval()
        for without in (torch.no_grad, torch.inference_mode):
            with without():
                same_values = [*steps_of(ours)] == [*steps_of(theirs)]
            found[f"{dtype}, {without.__name__}"] = same_values
    return found


def check_unrolled(root, model, module):
    """More of the loop in the graph is their own code without `no_grad`."""
    every = H_CYCLES * (L_CYCLES if model.is_hrm else 1)
    specs = {"tbptt(k=1)": 1, "tbptt(k=2)": 2, "tbptt(k='all')": every, "bptt": every}
    found = {}
    for spec, k in specs.items():
        ours = trained(built(module, model, "float64", grad=spec))
        theirs = unrolled(root, model, k)
        found[spec] = error(ours[1], theirs[1]) + float((ours[0][1] - theirs[0][1]).abs())
    one = unrolled(root, model, 1)[1]
    found["tells apart"] = min(error(one, unrolled(root, model, k)[1]) for k in (2, every))
    return found


def check_in_memory(root, model, module):
    """`deq-phantom run --grad 'tbptt(k=2)'`: the module that was imported is patched."""
    ours = trained(built(module, model, "float64"))
    return {"tbptt(k=2)": error(ours[1], unrolled(root, model, 2)[1])}


class Given(torch.nn.Module):
    """In place of the loop: its end as the reference has it, as leaves whose gradient is v."""

    def __init__(self, model, inner):
        super().__init__()
        self.of = model, inner

    def forward(self, func, state, at=None):
        leaves, structure = tree_flatten(state)
        reference = Reference(*self.of, [leaf.detach() for leaf in leaves])
        end = reference.states[-1]
        if torch.is_grad_enabled():  # unlike HRM's target of Q
            self.reference = reference
            self.end = end = [leaf.clone().requires_grad_() for leaf in end]
        return tree_unflatten([*end], structure)


class Reference:
    """The loop by hand, and dense Jacobians of its map."""

    def __init__(self, model, inner, start):
        self.model, self.inner, self.start = model, inner, start
        with torch.no_grad():
            func, state = self.func(), start
            self.states = [state]
            for _ in range(H_CYCLES):
                if model.is_hrm:
                    for _ in range(L_CYCLES - 1):
                        state = (state[0], func(*state)[1])
                    self.states.append(state)
                state = func(*state)
                self.states.append(state)

    def func(self):
        data = batch()
        embed = self.inner._input_embeddings
        names = ("inputs", "puzzle_identifiers")[: embed.__code__.co_argcount - 1]
        x, seq = embed(*(data[name] for name in names)), {"cos_sin": self.inner.rotary_emb()}
        return self.model.func(self.inner, x, seq, self.start)

    def add(self, point, v, solve):
        """Add to the gradients those through the map at a point: of g = solve(J^T, v)."""
        leaves = [leaf.detach().clone().requires_grad_() for leaf in point]
        image = torch.cat([leaf.flatten() for leaf in self.func()(*leaves)])
        rows = [
            torch.cat([g.flatten() for g in torch.autograd.grad(y, leaves, retain_graph=True)])
            for y in image
        ]
        image.backward(solve(torch.stack(rows).T, v))


def in_double(module, head):
    """Their norm, rotation and convolution round to less whatever they are given."""

    def rms_norm(hidden_states, variance_epsilon):
        square = hidden_states.square().mean(-1, keepdim=True)
        return hidden_states * torch.rsqrt(square + variance_epsilon)

    module.rms_norm = rms_norm
    for layer in head.modules():
        if type(layer).__name__ in ("RotaryEmbedding", "Conv1d"):
            layer.double()
    return head


def check_implicit(root, model, module):
    """`npg` and `ift` are what dense Jacobians say."""

    def neumann(transposed, v):
        term = total = v
        for _ in range(3):
            term = transposed @ term
            total = total + term
        return total

    def solved(transposed, v):
        return torch.linalg.solve(torch.eye(len(v)) - transposed, v)

    found, of = {}, {}
    specs = {
        "jfb": (-2, lambda transposed, v: v),
        "npg(k=4, lam=1.0)": (-1, neumann),
        "ift(tol=1e-12, max_iter=300)": (-2, solved),
        "exact": (-2, solved),
    }
    quiet = {"noise_scale": 0.0}
    for spec, (place, solve) in specs.items():
        head = in_double(module, built(module, model, "float64", grad=spec, **quiet))
        loss, of[spec] = trained(head, 1)
        head = in_double(module, built(module, model, "float64", **quiet))
        head.model.inner.loop = given = Given(model, head.model.inner)
        wanted, _ = trained(head, 1)
        v = torch.cat(
            [(torch.zeros_like(h) if h.grad is None else h.grad).flatten() for h in given.end]
        )
        given.reference.add(given.reference.states[place], v, solve)
        found[spec] = error(of[spec], gradients(head)) + float((loss[0] - wanted[0]).abs())
    found["tells apart"] = min(error(of["jfb"], of[spec]) for spec in [*specs][1:])
    return found


class Supervised(torch.nn.Module):
    """Two supervision steps as one forward pass, so that a training step has two equilibria."""

    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, x):
        return sum(steps_of(self.head))


def check_tools(root, model, module):
    """Schedules, monitors and reports with two equilibria in a training step."""
    schedule = "schedule({0: 'tbptt(k=1)', 10: 'tbptt(k=2)'})"
    head = built(module, model, "float64", grad=schedule, noise_scale=0.0)
    found = {}
    for step, k in ((0, 1), (10, 2)):
        dpp.set_step(head, step)
        theirs = unrolled(root, model, k, noise_scale=0.0)
        found[f"schedule at {step}"] = error(trained(head)[1], theirs[1])
    logged = []
    supervised = Supervised(head)
    with dpp.monitor(supervised, lambda numbers, step: logged.append(numbers), every=1):
        supervised(None).backward()
    found["monitored"] = sorted(logged[0]) if logged else None
    report = dpp.model_report(supervised, None, lambda loss: loss, ["tbptt(k=1)", "npg", "ift"])
    found["reported"] = [
        [r.strategy for r in one.results if r.error is None] for one in report.reports
    ]
    return found


def check_compiled(root, model, module):
    """Whether the inner forward pass is one graph, of the original and of the patched model."""
    found = {}
    cases = [("original", loaded_original(root, model), None)]
    specs = (None, "tbptt(k=2)", "tbptt(k='all')", "upg")
    cases += [(spec or "own", module, spec) for spec in specs]
    for name, of, spec in cases:
        torch._dynamo.reset()
        # Where the puzzle embeddings of URM look at numbers, no code is one graph.
        plain = {"puzzle_emb_ndim": 0, "puzzle_emb_len": 0}
        head = built(of, model, "float32", grad=spec, **plain)
        want = trained(head)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        head.model.inner.forward = torch.compile(
            head.model.inner.forward, backend="aot_eager", fullgraph=True
        )
        try:
            for step in range(3):
                if of is module:
                    dpp.set_step(head, step)
                got = trained(head)
        except Exception as failure:
            found[name] = f"{type(failure).__name__}: {failure}"[:600]
            continue
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs
        found[name] = [error(got[1], want[1]), graphs]
    return found


def main(name, root, check):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    compat.apply("flash_attn")
    sys.path.insert(0, os.getcwd())
    model = MODELS[name]
    module = importlib.import_module(model.module)
    print("RESULT", json.dumps(globals()[f"check_{check}"](root, model, module)))


if __name__ == "__main__":
    main(*sys.argv[1:])
