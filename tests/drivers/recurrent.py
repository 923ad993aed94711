"""Compares patched recurrent language models with the files they were made from, as JSON.

Run in the folder of a patched code base, or of one that `deq-phantom run` patches in memory:

    python recurrent.py MODEL ORIGINAL CHECK

MODEL is `dynamic`, the model that is trained, or `raven`, the one for Transformers. ORIGINAL is a
checkout as it was. What the original says is by its own code, its `no_grad` taken away where a
check wants more of the loop in the graph.
"""

import ast
import contextlib
import importlib
import json
import os
import sys
import types
import warnings
from pathlib import Path
from unittest import mock

import torch
from recursive import WithoutNoGrad, detached, error, gradients, same

import deq_phantom_plugin as dpp

SIZES = {
    "n_embd": 8,
    "block_size": 16,
    "vocab_size": 11,
    "padding_multiple": 1,
    "intermediate_size": 12,
    "injection_type": "linear",
    "n_layers_in_prelude": 1,
    "n_layers_in_recurrent_block": 2,
    "n_layers_in_coda": 1,
    "mean_recurrence": 6,
    "mean_backprop_depth": 2,
    "qk_bias": True,
}
SCHEMES = (
    "bptt",
    "non-uniform",
    "gupta",
    "simple",
    "poisson-lognormal-filling",
    "poisson-lognormal-fill",
    "poisson-lognormal",
    "poisson-unbounded",
    "poisson-fill",
    "poisson-bounded",
    "negative-binomial",
    "sobol",
    "geometric",
    "fixed",
    "non-recurrent",
    "full",
    "simple-curriculum-10",
)
NOISE = ("geom", "sqrt", "line", "chi", "fixed")
PAIR = (3, 2)  # evaluations without and with a graph, where a check counts them


# --- the modules ----------------------------------------------------------------------------------


def stand_in(name, **content):
    """Put a module in the place of one that cannot be imported here."""
    module = types.ModuleType(name)
    vars(module).update(content)
    sys.modules[name] = module
    return module


def stand_ins(root):
    """Make the package importable without Lightning and Triton, of which only names are needed.

    Its own `checkpoint_patch` is for PyTorch 2.5 and lower, and imports what is gone since.
    """
    import torch._dynamo
    import torch.utils.checkpoint as checkpoints
    import torch.utils.flop_counter  # noqa: F401

    stand_in("recpre").__path__ = [str(root / "recpre")]
    name = "_checkpoint_without_reentrant_generator"
    stand_in("recpre.checkpoint_patch", **{name: getattr(checkpoints, name)})
    source = ast.parse((root / "recpre" / "utils.py").read_bytes())
    source.body = [n for n in source.body if getattr(n, "name", None) == "find_multiple"]
    exec(compile(source, "utils.py", "exec"), vars(stand_in("recpre.utils")))
    triton = mock.MagicMock()
    triton.Config = lambda kwargs, **named: types.SimpleNamespace(kwargs=kwargs, **named)
    with mock.patch.dict(sys.modules, {"triton": triton, "triton.language": triton.language}):
        for name in ("config_dynamic", "norms", "ops"):
            importlib.import_module(f"recpre.{name}")
        kept = {name: module for name, module in sys.modules.items() if name.startswith("recpre")}
    sys.modules.update(kept)


def loaded(root, file):
    """Return a module of the checkout as it was; what it imports are the files here."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    path = Path(root, "recpre", f"{file}.py")
    module = stand_in(f"recpre.original_{file}", __package__="recpre")
    with contextlib.ExitStack() as stack:
        for auto in (AutoConfig, AutoModel, AutoModelForCausalLM):  # these take a name once
            stack.enter_context(mock.patch.object(auto, "register"))
        exec(compile(path.read_bytes(), str(path), "exec"), vars(module))
    return with_todays_transformers(module)


def with_todays_transformers(module):
    """Let its output keep the name that it has: Transformers 5 takes it for another."""
    output = getattr(module, "CausalLMOutputRecurrentLatents", None)
    if output is not None and hasattr(output.__init__, "__wrapped__"):
        type.__setattr__(output, "__init__", output.__init__.__wrapped__)
    return module


class Dynamic:
    """`recpre/model_dynamic.py`, whose settings are a dataclass."""

    file = "model_dynamic"

    def __init__(self, root):
        self.original = loaded(root, self.file)
        self.module = importlib.import_module(f"recpre.{self.file}")

    @staticmethod
    def settings(**changes):
        from recpre.config_dynamic import RecurrentConfig

        known = {
            "num_attention_heads": 2,
            "block_class_name": "SandwichBlock",
            "norm_class_name": "RMSNorm_llama",
            "mlp_class_name": "GatedMLP",
            "nonlin_name": "SiLU",
            "init_strategy": "takase",
        }
        settings = RecurrentConfig(**{**SIZES, **known, **changes})
        settings.maximal_recurrence = 6  # which it has no field for, and one kind of noise reads
        return settings

    def built(self, module, checkpointed=False, **changes):
        torch.manual_seed(0)
        made = module.RecurrentGPT(self.settings(**changes), {"ignore_index": -1}, checkpointed)
        return made.to(torch.get_default_dtype()).train()

    @staticmethod
    def loss(model, pair=None, step=1):
        model.step = step
        pair = None if pair is None else torch.tensor(pair)
        return model(**batch(), num_steps_pair=pair)["loss"]

    @staticmethod
    def func(model):
        """One evaluation, written out."""
        parts, freqs = model.transformer, model.freqs_cis[:, :4]
        e = parts.wte(batch()["input_ids"]) * model.emb_scale
        for block in parts.prelude:
            e = block(e, freqs, None)

        def func(x):
            x = parts.adapter(torch.cat([x, e], dim=-1))
            for block in parts.core_block:
                x = block(x, freqs, None)
            return x

        return func


class Raven:
    """`recpre/raven_modeling_minimal.py`, whose settings are a configuration of Transformers."""

    file = "raven_modeling_minimal"

    def __init__(self, root):
        self.module = with_todays_transformers(importlib.import_module(f"recpre.{self.file}"))
        self.original = loaded(root, self.file)

    @staticmethod
    def settings(**changes):
        from recpre.raven_config_minimal import RavenConfig

        known = {"n_heads": 2, "n_layers": 4, "tie_embeddings": False}
        return RavenConfig(**{**SIZES, **known, **changes})

    def built(self, module, checkpointed=False, noise=0.0, noise_type="fixed", **changes):
        torch.manual_seed(0)
        config = self.settings(**changes)
        config.test_time_noise, config.test_time_noise_type = noise, noise_type
        made = module.RavenForCausalLM(config)
        made.gradient_checkpointing = checkpointed
        return made.to(torch.get_default_dtype()).train()

    @staticmethod
    def loss(model, pair=None, step=1):
        return model(**batch(), num_steps=None if pair is None else torch.tensor(pair)).loss

    @staticmethod
    def func(model):
        """One evaluation, written out."""
        parts, freqs = model.transformer, model.freqs_cis[:, :4]
        e = parts.wte(batch()["input_ids"]) * model.emb_scale
        for block in parts.prelude:
            e = block(e, freqs, 0)

        def func(x):
            x = parts.adapter(torch.cat([x, e], dim=-1))
            for block in parts.core_block:
                x = block(x, freqs, 0)
            return x

        return func


MODELS = {"dynamic": Dynamic, "raven": Raven}


def batch():
    ids = torch.tensor([[1, 7, 3, 2], [4, 10, 9, 0]])
    return {"input_ids": ids, "labels": ids.roll(1, 1)}


def trained(kind, model, steps=1, pair=None):
    """Return losses, the gradients of all that is learned, and the random state after them."""
    torch.manual_seed(5)
    losses = []
    model.zero_grad()
    for step in range(1, steps + 1):
        loss = kind.loss(model, pair, step)
        if loss.requires_grad:
            loss.backward()
        losses.append(loss.detach())
    return [*losses, torch.get_rng_state()], gradients(model)


def unrolled(kind, k, pair=PAIR, **settings):
    """Train the original with its last k evaluations in the graph; earlier ones are cut off."""
    model = kind.built(kind.original, **settings)
    hook = model.transformer.core_block[-1].register_forward_hook(detached(sum(pair) - k))
    kind.original.torch = WithoutNoGrad()
    try:
        return trained(kind, model, pair=pair)
    finally:
        kind.original.torch = torch
        hook.remove()


# --- the checks -----------------------------------------------------------------------------------


def check_own(kind):
    """Nothing named: their own training, bit for bit, random numbers included."""
    found = {}

    def compare(name, steps=3, pair=None, **settings):
        ours = kind.built(kind.module, grad=None, **settings)
        theirs = kind.built(kind.original, grad=None, **settings)
        ours.load_state_dict(theirs.state_dict())
        for model in (ours, theirs):
            model.monitoring = True
        found[name] = same(trained(kind, ours, steps, pair), trained(kind, theirs, steps, pair))
        for metric, value in getattr(theirs, "latest_metrics", {}).items():
            found[f"{name}, {metric}"] = torch.equal(ours.latest_metrics[metric], value)
        ours.eval(), theirs.eval()
        for without in (torch.no_grad, torch.inference_mode):
            with without():
                values = [trained(kind, m, 1, pair)[0] for m in (ours, theirs)]
            found[f"{name}, {without.__name__}"] = all(map(torch.equal, *values))

    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        compare(f"{dtype}")
        compare(f"{dtype}, checkpointed", checkpointed=True)
        compare(f"{dtype}, a pair", pair=PAIR)
        for noise in NOISE:
            if kind.file == "model_dynamic":
                named = {"intermediate_noise_injection": 0.1, "geom_noise_injection": noise}
                named["embed_step"] = dtype is torch.float32
            else:
                named = {"noise": 0.1, "noise_type": noise}
            # A noise that is a number in float32 makes the state so, and their code stops there.
            with contextlib.suppress(RuntimeError if dtype is torch.bfloat16 else ()):
                compare(f"{dtype}, noise {noise}", **named)
    torch.set_default_dtype(torch.float32)
    if kind.file == "model_dynamic":
        for scheme in SCHEMES:
            compare(scheme, steps=6, sampling_scheme=scheme)
        for name in ("mcleish_throttle", "elbayad_weighing", "randomize_embed_step"):
            compare(name, **{name: True, "embed_step": True, "elbayad_exponent": 1.0})
        compare("per-block", checkpointed=True, activation_checkpoint_impl="per-block")
    return found


def check_unrolled(kind):
    """More of the loop in the graph is their own code without `no_grad`."""
    every = sum(PAIR)
    specs = {"tbptt(k=1)": 1, "tbptt(k=4)": 4, "tbptt(k='all')": every, "bptt": every}
    found = {}
    for spec, k in specs.items():
        for checkpointed in (False, True):
            model = kind.built(kind.module, checkpointed, grad=spec)
            ours, theirs = trained(kind, model, pair=PAIR), unrolled(kind, k)
            name = f"{spec}, checkpointed" if checkpointed else spec
            found[name] = error(ours[1], theirs[1]) + float((ours[0][0] - theirs[0][0]).abs())
    # One number, of which their own code has no graph at all.
    ours = trained(kind, kind.built(kind.module, grad="tbptt(k=4)"), pair=(every, 0))
    found["no graph of its own"] = error(ours[1], unrolled(kind, 4)[1])
    one = unrolled(kind, 1)[1]
    found["tells apart"] = min(error(one, unrolled(kind, k)[1]) for k in (2, every))
    return found


def check_in_memory(kind):
    """`deq-phantom run --grad 'tbptt(k=4)'`: the modules that were imported are patched."""
    ours = trained(kind, kind.built(kind.module), pair=PAIR)
    return {"tbptt(k=4)": error(ours[1], unrolled(kind, 4)[1])}


class Given(torch.nn.Module):
    """In place of the loop: its end by the map written out, as a leaf whose gradient is v."""

    def __init__(self, func):
        super().__init__()
        self.func, self.states = func, []

    def numbered(self, evaluate, start, free, graph, cache=None):
        with torch.no_grad():
            self.states = [start]
            for _ in range(int(free) + int(graph)):
                self.states.append(self.func(self.states[-1]))
        self.end = self.states[-1].clone().requires_grad_()
        return self.end, self.states[-2]


def check_implicit(kind):
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
        "ift(tol=1e-12, max_iter=400)": (-2, solved),
        "exact": (-2, solved),
    }
    for spec, (place, solve) in specs.items():
        (loss, *_), of[spec] = trained(kind, kind.built(kind.module, grad=spec), pair=PAIR)
        model = kind.built(kind.module, grad="jfb")
        model.loop = given = Given(kind.func(model))
        (wanted, *_), _ = trained(kind, model, pair=PAIR)
        point = given.states[place].detach().requires_grad_()
        image = kind.func(model)(point)
        rows = [
            torch.autograd.grad(y, point, retain_graph=True)[0].flatten() for y in image.flatten()
        ]
        image.flatten().backward(solve(torch.stack(rows).T, given.end.grad.flatten()))
        found[spec] = error(of[spec], gradients(model)) + float((loss - wanted).abs())
    found["tells apart"] = min(error(of["jfb"], of[spec]) for spec in [*specs][1:])
    return found


def check_tools(kind):
    """Schedules, monitors and reports; the depth is the model's own draw."""
    model = kind.built(kind.module, grad="schedule({0: 'tbptt(k=1)', 10: 'tbptt(k=4)'})")
    found = {}
    for step, k in ((0, 1), (10, 4)):
        dpp.set_step(model, step)
        ours = trained(kind, model, pair=PAIR)
        found[f"schedule at {step}"] = error(ours[1], unrolled(kind, k)[1])
    logged = []
    with dpp.monitor(model, lambda numbers, step: logged.append(numbers), every=1):
        trained(kind, model)
    found["monitored"] = sorted(logged[0]) if logged else None

    class Loss(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return kind.loss(self.model)

    report = dpp.model_report(Loss(), None, lambda loss: loss, ["tbptt(k=1)", "npg", "ift"])
    found["reported"] = [
        [r.strategy for r in one.results if r.error is None] for one in report.reports
    ]
    return found


def generated(kind, model, number=4):
    """Greedy tokens with a cache, their logits, and which evaluations have entries in it.

    By hand: the model's own `generate` is for Transformers 4.
    """
    tokens = batch()["input_ids"]
    torch.manual_seed(3)
    cache, logits = kind.original.HuginnDynamicCache(), []
    with torch.no_grad():
        for _ in range(number):
            start = tokens.shape[1] - 1 if logits else 0
            places = torch.arange(start, tokens.shape[1])
            out = model(
                tokens[:, start:],
                past_key_values=cache,
                use_cache=True,
                cache_position=places,
                num_steps=4,
            )
            logits.append(out.logits[:, -1])
            tokens = torch.cat([tokens, logits[-1].argmax(-1, keepdim=True)], dim=1)
    return torch.stack([*logits]), tokens, sorted(cache.key_cache)


def check_generation(kind):
    """Generation with a cache, whatever is named; a cache in training is refused."""
    found = {}
    logits, tokens, entries = generated(kind, kind.built(kind.original).eval())
    for training in (False, True):
        for spec in (None, "npg", "tbptt(k=4)"):
            model = kind.built(kind.module, grad=spec).train(training)
            ours = generated(kind, model)
            found[f"{spec}, {training}"] = (
                torch.equal(ours[0], logits) and torch.equal(ours[1], tokens) and ours[2] == entries
            )
    with contextlib.suppress(AttributeError):  # what it asks for is gone in Transformers 5
        texts = []
        for module, spec in ((kind.original, None), (kind.module, None), (kind.module, "npg")):
            torch.manual_seed(3)
            model = kind.built(module, grad=spec).eval()
            texts.append(model.generate(batch()["input_ids"], max_new_tokens=4, num_steps=3))
        found["generate"] = all(torch.equal(text, texts[0]) for text in texts)
    said = ""
    try:
        kind.built(kind.module, grad="npg")(batch()["input_ids"], use_cache=True)
    except ValueError as failure:
        said = str(failure)
    found["refused"] = said.startswith("a cache in training")
    own = kind.built(kind.module, grad=None)(batch()["input_ids"], use_cache=True)
    found["its own is not"] = own.logits.requires_grad
    return found


def main(name, root, check):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    sys.path.insert(0, os.getcwd())
    stand_ins(Path.cwd())
    kind = MODELS[name](root)
    if check != "own":
        torch.set_default_dtype(torch.float64)
        torch.Tensor.float = torch.Tensor.double  # norms, rotations and logits round to less
    print("RESULT", json.dumps(globals()[f"check_{check}"](kind)))


if __name__ == "__main__":
    main(*sys.argv[1:])
