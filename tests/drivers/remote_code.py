"""Loads Raven as `trust_remote_code` does and switches its gradient, as JSON.

    python remote_code.py ORIGINAL CHECK

ORIGINAL is a checkout; its model files are copied into a folder with a configuration and weights.
"""

import json
import os
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

FOLDER = Path(tempfile.mkdtemp())
os.environ.update(HF_HOME=str(FOLDER / "home"), HF_HUB_OFFLINE="1")

import torch  # noqa: E402
from recurrent import (  # noqa: E402
    PAIR,
    SIZES,
    Raven,
    batch,
    error,
    generated,
    same,
    trained,
    with_todays_transformers,
)

import deq_phantom_plugin as dpp  # noqa: E402

FILES = ("raven_modeling_minimal.py", "raven_config_minimal.py")
CONFIG = {
    "architectures": ["RavenForCausalLM"],
    "model_type": "huginn_raven",
    "auto_map": {
        "AutoConfig": "raven_config_minimal.RavenConfig",
        "AutoModelForCausalLM": "raven_modeling_minimal.RavenForCausalLM",
    },
    **SIZES,
    "n_heads": 2,
    "n_layers": 4,
    "torch_dtype": "float32",
}


def folder(root, name="huginn", edit=None, **changes):
    """Return a folder as it is on the hub, its code changed by (old, new) where asked for."""
    made = FOLDER / name
    made.mkdir(exist_ok=True)
    for file in FILES:
        text = (root / "recpre" / file).read_text()
        if edit is not None:
            text = text.replace(*edit)
        (made / file).write_text(text)
    (made / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    return made


def tied(module):
    """Let its list of tied weights be the mapping that Transformers 5 wants of it."""
    import transformers

    if int(transformers.__version__.partition(".")[0]) > 4:
        module.RavenPreTrainedModel._tied_weights_keys = {
            "lm_head.weight": "transformer.wte.weight"
        }
    return with_todays_transformers(module)


def loaded(made, **settings):
    """Return a model as `from_pretrained` loads it, its weights saved at the first call."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    cls = get_class_from_dynamic_module("raven_modeling_minimal.RavenForCausalLM", str(made))
    tied(sys.modules[cls.__module__])
    if not (made / "model.safetensors").exists():
        config = AutoConfig.from_pretrained(str(made), trust_remote_code=True)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
        text = (made / "config.json").read_text()
        model.save_pretrained(str(made))
        (made / "config.json").write_text(text)
    model = AutoModelForCausalLM.from_pretrained(str(made), trust_remote_code=True, **settings)
    assert type(model).__module__.startswith("transformers_modules.")
    return model.train()


class Remote(Raven):
    """What the checks of `Raven` need of a module."""

    def __init__(self, model):
        self.module = self.original = sys.modules[type(model).__module__]


def check_switched(root):
    """One model with one name after another, against itself without the host."""
    model = loaded(folder(root))
    kind, found = Remote(model), {}
    plain = type(model).__dict__["iterate_forward"]
    own = trained(kind, model, 2)
    text = generated(kind, model.eval())
    model.train()

    def is_own():
        return same(trained(kind, model.train(), 2), own) and all(
            torch.equal(a, b)
            for a, b in zip(generated(kind, model.eval())[:2], text[:2], strict=True)
        )

    dpp.enable("raven")
    found["enabled, no name"] = is_own() and "grad_memory.step" not in model.state_dict()
    model.train()
    found["switched"] = dpp.set_grad(model, "tbptt(k='all')") == 1
    longer = trained(kind, model, pair=PAIR)
    found["written"] = model.config.grad == "tbptt(k='all')"
    model.config.grad = None
    by_caller = trained(kind, model, pair=(0, sum(PAIR)))
    found["all of the loop"] = error(longer[1], by_caller[1]) < 1e-6
    found["differs"] = not same(longer, trained(kind, model, pair=PAIR))
    # The state after the loop is the repository's own, whatever is named.
    for spec in ("npg", "ift", "jfb", "bptt", "upg(k=2, lam=1.0)", "guard('ift')"):
        dpp.set_grad(model, spec)
        found[f"loss of {spec}"] = torch.allclose(
            trained(kind, model)[0][0], own[0][0], rtol=1e-5, atol=0
        )
    same_text = [
        torch.equal(a, b) for a, b in zip(generated(kind, model.eval())[:2], text[:2], strict=True)
    ]
    found["generation"] = all(same_text)
    model.train()
    dpp.set_grad(model, None)
    found["None"] = is_own() and "grad" not in vars(model.config)
    dpp.set_grad(model, "npg")
    dpp.disable("raven")
    found["disabled"] = is_own() and type(model).__dict__["iterate_forward"] is plain
    return found


def check_named_in_the_config(root):
    """`grad` in a config.json, kept by `save_pretrained`; the step is no weight to place."""
    dpp.enable("raven")
    model = loaded(folder(root, "named", grad="npg(k=2)"))
    kind, found = Remote(model), {}
    found["named"] = str(model.config.grad) == "npg(k=2)"
    found["remembers"] = "grad_memory.step" in model.state_dict()
    dpp.set_step(model, 7, total=9)
    named = trained(kind, model)
    saved = FOLDER / "saved"
    model.save_pretrained(str(saved))
    config = json.loads((saved / "config.json").read_text())
    found["saved"] = config["grad"] == "npg(k=2)"
    config.pop("tie_word_embeddings", None)  # which their own code takes for an argument too many
    (saved / "config.json").write_text(json.dumps(config))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = loaded(saved)
    found["loaded"] = same(trained(kind, again), named)
    dpp.set_grad(again, None)
    found["differs"] = not same(trained(kind, again), named)
    again.config.grad = "npg(k=2)"
    found["by hand"] = same(trained(kind, again), named)
    return found


def check_tools(root):
    """Schedules, monitors and reports; in evaluation mode what was asked for."""
    dpp.enable("raven")
    model, found, logged = loaded(folder(root)), {}, []
    kind = Remote(model)
    with dpp.monitor(model, lambda numbers, step: logged.append(numbers), every=1):
        own = trained(kind, model)
    found["monitored"] = sorted(logged[0]) if logged else None
    dpp.set_grad(model, "schedule({0: 'tbptt(k=1)', 0.5: 'tbptt(k=4)'})")
    dpp.set_step(model, 4, total=10)
    early = trained(kind, model, pair=PAIR)
    dpp.set_step(model, 5)
    late = trained(kind, model, pair=PAIR)
    dpp.set_grad(model, None)
    pairs = [trained(kind, model, pair=(sum(PAIR) - k, k)) for k in (1, 4)]
    found["schedule"] = error(early[1], pairs[0][1]) < 1e-6 and error(late[1], pairs[1][1]) < 1e-6
    dpp.set_grad(model, "npg")
    report = dpp.model_report(model, batch(), lambda out: out.loss, ["tbptt(k=1)", "ift"])
    found["reported"] = [r.strategy for r in report.reports[0].results if r.error is None]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        kind.loss(model.eval())
    found["said in evaluation"] = sum("evaluation mode" in str(w.message) for w in said) == 1
    dpp.set_grad(model, "tbptt(k=2)", in_eval=True)
    found["in evaluation"] = any(g.abs().sum() > 0 for g in trained(kind, model)[1].values())
    try:
        model.train()(batch()["input_ids"], use_cache=True)
    except ValueError as failure:
        found["a cache"] = str(failure).startswith("a cache in training")
    dpp.set_grad(model, None)
    found["own again"] = same(trained(kind, model), own)
    return found


def check_another_version(root):
    """Code that is not known runs untouched, and a name for it is refused."""
    dpp.enable("raven")
    edit = ("for grad_step in range(num_steps_with_grad):", "for grad_step in range(2):")
    model, said = loaded(folder(root, "other", edit)), []
    kind = Remote(model)
    trained(kind, model)
    for name in (
        lambda: dpp.set_grad(model, "npg"),
        lambda: dpp.monitor(model, print).__enter__(),
        lambda: loaded(folder(root, "other_named", edit, grad="npg")),
    ):
        try:
            name()
        except ValueError as failure:
            said.append(str(failure))
    trained(kind, model)
    return {"said": said}


def main(root, check):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    try:
        print("RESULT", json.dumps(globals()[f"check_{check}"](Path(root))))
    finally:
        shutil.rmtree(FOLDER, ignore_errors=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
