"""sapientinc/HRM-Text: four looped language models, and their pre-training.

All four models run a part of their evaluations with a graph, and the others without. With a
key-value cache the repository's own loops run, since generation needs no gradient.

`ut` and `rins` iterate one map. The last `bp_cycles` (`L_bp_cycles`) evaluations have a graph.

`hrm` has HRM's loop, with the evaluation and the map F that `sapientinc_hrm` describes. Its
`bp_steps` are given to H steps first, and then to L steps. So with 3 of them and 2 times 3 cycles,
the first H step has a graph and the L step after it has none. No `tbptt(k)` does that. As long as
no gradient is named, each step has the graph that the repository gives it. `bp_warmup_ratio`
changes only this number of steps.

`trm` has the same loop, with one module for H and L. One evaluation is one H cycle there, as in
TinyRecursiveModels.

A state holds the tokens of several texts in one row, so the batch is one system and has no samples.

The repository's loader demands every key of the model in a checkpoint. So the training step, which
`pretrain.py` passes to the model in each step, is not saved in the `state_dict`.
"""

from __future__ import annotations

from deq_phantom_plugin.patching.adapter import YAML, Adapter, Edit, Project, SeamFile

HRM = (
    "if cache is None:\n"
    "    total = self.H_cycles * self.L_cycles\n\n"
    "    def carries(own):\n"
    "        own = own or not self.loop.is_own\n"
    "        return torch.set_grad_enabled(torch.is_grad_enabled() and own)\n\n"
    "    def low(state):\n"
    "        return state[0], self.L_level(state[1], state[0], **seq_info)\n\n"
    "    def high(state):\n"
    "        return self.H_level(*state, **seq_info), state[1]\n\n"
    "    def at(k, state):\n"
    "        with carries(k >= total - L_bp_steps):\n"
    "            state = low(state)\n"
    "        if (k + 1) % self.L_cycles:\n"
    "            return state\n"
    "        with carries(k >= total - H_bp_steps * self.L_cycles):\n"
    "            return high(state)\n\n"
    "    begin = x, self.zL_init.to(x.dtype).expand_as(x)\n"
    "    return None, self.loop(lambda state: high(low(state)), begin, at)[0]"
)
TRM = (
    "if cache is None:\n"
    "    def step(z, injection, graph):\n"
    "        with torch.set_grad_enabled(torch.is_grad_enabled() and graph):\n"
    "            return self.L_level(z, injection, **seq_info)\n\n"
    "    def cycle(state, L_graph=self.L_cycles, H_graph=True):\n"
    "        z_H, z_L = state\n"
    "        for k in range(self.L_cycles):\n"
    "            z_L = step(z_L, z_H, k >= self.L_cycles - L_graph)\n"
    "        return step(z_H, z_L, H_graph), z_L\n\n"
    "    def own(i, state):\n"
    "        later = self.H_cycles - i - 1\n"
    "        L_graph = self.L_bp_steps - later * self.L_cycles\n"
    "        return cycle(state, L_graph, later < self.H_bp_steps)\n\n"
    "    begin = x, self.zL_init.to(x.dtype).expand_as(x)\n"
    "    return None, self.loop(cycle, begin, own if self.loop.is_own else None)[0]"
)
UT = (
    "if cache is None:\n"
    "    return None, self.loop(\n"
    "        lambda z: self.L_level(z, x, **seq_info),\n"
    "        z.to(x.dtype).expand_as(x), graph=self.bp_cycles)"
)
RINS = (
    "if cache is None:\n"
    "    z_L = self.loop(\n"
    "        lambda z: self.L_level(z, x, **seq_info),\n"
    "        z_L.to(x.dtype).expand_as(x), graph=self.L_bp_cycles)\n"
    "    return None, self.H_level(z_L, None, **seq_info)"
)


def _model(
    what: str,
    config: str,
    name: str,
    last: str,
    known: str,
    *,
    loop: str,
    new: str,
    steps: str,
    own: str = "",
) -> SeamFile:
    """Return the seam of a file with one model.

    Args:
        what: the name of the model, for messages.
        config: the class of its settings.
        name: the class of the model.
        last: the beginning of its last setting.
        known: the fingerprint of its forward pass.
        loop: the beginning of its loop.
        new: the code that runs in place of the loop if there is no cache.
        steps: the number of evaluations, as a Python expression.
        own: the argument `own` of `patching.Loop`, as it is written in the call.
    """
    made = f"{name}.__init__"
    rest = f"steps={steps}{own}, saved=False, batch_dim=None)"
    return SeamFile(
        f"the model {what}",
        (f"class {config}(TransformerConfig)", f"class {name}(nn.Module)"),
        (
            Edit(last, "grad: Optional[str] = {grad}", scope=config, mode="patch"),
            Edit(
                "self.zL_init =",
                f"self.loop = deq_phantom_plugin.patching.Loop(config.grad, {rest}",
                scope=made,
                mode="patch",
            ),
            Edit(
                "self.zL_init =",
                f"self.loop = deq_phantom_plugin.patching.Loop({{grad}}, {rest}",
                scope=made,
                mode="run",
            ),
            Edit(loop, new, "before", scope=f"{name}.forward"),
        ),
        {f"{name}.forward": (known,)},
    )


def _architecture(name: str, cycles: str) -> SeamFile:
    """Return the seam of the Hydra configuration of a model.

    Args:
        name: the end of the model's name in the configuration.
        cycles: the key after which `grad` is inserted.
    """
    return SeamFile(
        "the configuration",
        (f"name: baselines.{name}\n", f"\n{cycles}:"),
        (Edit(f"{cycles}:", "grad: {grad}", mode="patch"),),
        required=False,
        endings=YAML,
    )


_ALL = ", own=\"tbptt('all')\""

HRM_TEXT = Project(
    "sapientinc/HRM-Text",
    "`arch.grad=...` on its command line, or `grad: ...` in its config/arch/net/*.yaml",
    (
        _model(
            "hrm",
            "HierarchicalReasoningModelConfig",
            "HierarchicalReasoningModel",
            "bp_max_steps: int",
            "ce942aa159608147",
            loop="for i in range(self.H_cycles):",
            new=HRM,
            steps="config.H_cycles * config.L_cycles",
            own=_ALL,
        ),
        _model(
            "trm",
            "TinyRecursiveModelConfig",
            "TinyRecursiveModel",
            "L_bp_steps: int",
            "a6c93fc540408b37",
            loop="for i in range(self.H_cycles):",
            new=TRM,
            steps="config.H_cycles",
            own=_ALL,
        ),
        _model(
            "ut",
            "UniversalTransformerConfig",
            "UniversalTransformer",
            "bp_cycles: int",
            "550ace432661b42c",
            loop="for i in range(self.cycles):",
            new=UT,
            steps="config.cycles",
        ),
        _model(
            "rins",
            "RINSConfig",
            "RINS",
            "L_bp_cycles: int",
            "87b4c88c1db9e1c8",
            loop="for i in range(self.L_cycles):",
            new=RINS,
            steps="config.L_cycles",
        ),
        _architecture("hrm_nocarry_bp_warmup@HierarchicalReasoningModel", "L_cycles"),
        _architecture("trm_nocarry@TinyRecursiveModel", "L_cycles"),
        _architecture("rins_nocarry@RINS", "L_cycles"),
        _architecture("ut_nocarry@UniversalTransformer", "cycles"),
        SeamFile(
            "the training script",
            ("def launch(", "compute_train_extra_args(train_state)"),
            (
                Edit(
                    "train_extra_args =",
                    "deq_phantom_plugin.patching.tell_step(\n"
                    "    train_state.model, train_state.step - 1,\n"
                    "    getattr(config.arch, 'grad', None), train_state.total_steps)",
                    "before",
                    scope="launch",
                    mode="patch",
                ),
            ),
            required=False,
        ),
    ),
)

ADAPTER = Adapter("sapientinc/HRM-Text", ("da566c9957efde8a45b96545e7feec27f9da4c15",), (HRM_TEXT,))
