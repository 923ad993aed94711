"""seal-rg/recurrent-pretraining: the depth-recurrent language models of Huginn, "Raven".

`iterate_forward` draws two numbers, n and k. It evaluates the recurrent block n times without a
graph, and then k times with a graph. The draw stays, whatever gradient is named: the loop has n + k
evaluations, as in the repository's own training. One evaluation of our loop is one
`core_block_forward` of the state (B, L, D).

Evaluations are numbered. The number scales the noise, is embedded (`embed_step`), and counts layers
for the cache of keys and values. `tbptt` and `bptt` differentiate the evaluations as they were. The
map F of `npg`, `ift`, `jfb`, `upg` and of reports is the last evaluation, always with its own
number. Without noise and `embed_step`, all evaluations are the same map. If a gradient is named, no
cache is accepted in training, since a strategy would write to it again. Generation runs under
`torch.no_grad`, and does not change.

- `num_steps` of a caller is used too. It is a pair, or one number, which is n with k = 0. The
  repository's code then has no graph. A named gradient has one in training mode all the same.
- Each evaluation draws noise; `locuslab_eqr` says what that means for each strategy. The gradient
  checkpoints of this repository do not keep random state. So an evaluation that is repeated in the
  backward pass has other noise, in the repository's own training as well.
- A loss that is divided by k (`mcleish_throttle`), or weighed by n + k, stays as it is.
- Each process draws its own depth, unless `lockstep_n` and `lockstep_k` are set. DDP works with
  that, since it only waits for the gradients of the parameters. Blocks that FSDP shards by
  themselves do not: every evaluation, and every product with the Jacobian of F, waits for all
  processes. In that case set both, and take no strategy that stops at a tolerance (`ift`) or
  evaluates F again in the backward pass.
- The training step is the repository's own count of micro-batches, as `max_steps` counts them.

`legacy_modeling_file.py` is not imported anywhere, and is not patched. `vllm` does not train, and
is not patched either.
"""

from __future__ import annotations

from deq_phantom_plugin.hosts.raven import KNOWN
from deq_phantom_plugin.patching.adapter import Adapter, Edit, Project, SeamFile

_LOOP = "self.loop = deq_phantom_plugin.patching.Loop({spec})"


def _loop(made: str, anchor: str) -> tuple[Edit, Edit]:
    """Return the edits that make the loop of a model.

    A patched model reads the spec from its configuration. Under `deq-phantom run` the spec is
    written into the code.

    Args:
        made: the constructor of the model.
        anchor: the statement after which the loop is made.
    """
    own, named = _LOOP.format(spec="config.grad"), _LOOP.format(spec="{grad}")
    return (
        Edit(anchor, own, scope=made, mode="patch"),
        Edit(anchor, named, scope=made, mode="run"),
    )


_DYNAMIC = (
    "free = max(int(num_steps_no_grad), 0)\n\n"
    "def evaluate(i, state):\n"
    "    step = (i if i < free else num_steps_no_grad + (i - free)) + offset\n"
    "    arguments = (state, input_embeds, freqs_cis, mask, step)\n"
    "    checkpointed = torch.is_grad_enabled() and self.gradient_checkpointing\n"
    "    if checkpointed and 'per-iteration' in self.config.activation_checkpoint_impl:\n"
    "        return self.config.checkpoint(self.core_block_forward, *arguments)\n"
    "    return self.core_block_forward(*arguments)\n\n"
    "x, xk = self.loop.numbered(evaluate, x, free, num_steps_with_grad)"
)
_MINIMAL = (
    "free, first = max(int(num_steps_no_grad), 0), block_idx\n"
    "layers = len(self.transformer.core_block)\n\n"
    "def evaluate(i, state):\n"
    "    step = i if i < free else num_steps_no_grad + (i - free)\n"
    "    arguments = (state, input_embeds, freqs_cis, mask, past_key_values,\n"
    "                 first + i * layers, step)\n"
    "    if torch.is_grad_enabled():\n"
    "        return self._maybe_checkpoint_core_block(*arguments)[0]\n"
    "    return self.core_block_forward(*arguments)[0]\n\n"
    "x, xk = self.loop.numbered(evaluate, x, free, num_steps_with_grad, past_key_values)\n"
    "block_idx = first + (free + max(int(num_steps_with_grad), 0)) * layers"
)

DYNAMIC = SeamFile(
    "the model",
    ("class RecurrentGPT", "def iterate_forward", "num_steps_pair"),
    (
        *_loop("RecurrentGPT.__init__", "self.objective = objective"),
        Edit(
            "with torch.no_grad():",
            _DYNAMIC,
            "replace",
            through="for step in range(num_steps_with_grad):",
            scope="RecurrentGPT.iterate_forward",
        ),
    ),
    {"RecurrentGPT.iterate_forward": ("ad19c1c2b507db25",)},
)

MINIMAL = SeamFile(
    "the model for Transformers",
    ("class RavenForCausalLM", "def iterate_forward", "def _maybe_checkpoint_core_block"),
    (
        Edit(
            "_tied_weights_keys =",
            # The training step is in the `state_dict`, but it is not a weight. So Transformers'
            # loader must not report it as missing or unexpected.
            "_keys_to_ignore_on_load_missing = ['loop.memory']\n"
            "_keys_to_ignore_on_load_unexpected = ['loop.memory']",
            scope="RavenPreTrainedModel",
        ),
        *_loop("RavenForCausalLM.__init__", "self.gradient_checkpointing = False"),
        Edit(
            "with torch.no_grad():",
            _MINIMAL,
            "replace",
            through="for grad_step in range(num_steps_with_grad):",
            scope="RavenForCausalLM.iterate_forward",
        ),
    ),
    {"RavenForCausalLM.iterate_forward": KNOWN},
    required=False,
)

FIELDS = SeamFile(
    "the configuration",
    ("class RecurrentConfig(", "mean_backprop_depth"),
    (
        Edit(
            "lockstep_k: bool",
            "grad: Optional[str] = {grad}  # the gradient of the loop, None for its own",
            scope="RecurrentConfig",
            mode="patch",
        ),
    ),
    imports="",
)

RAVEN_FIELDS = SeamFile(
    "the configuration for Transformers",
    ("class RavenConfig(", "self.test_time_noise = 0"),
    (
        Edit(
            "super().__init__(",
            "self.grad = kwargs.pop('grad', {grad})  # the loop's gradient, None for its own",
            "before",
            scope="RavenConfig.__init__",
            mode="patch",
        ),
    ),
    required=False,
    imports="",
)

TRAINING = SeamFile(
    "the training script",
    ("def train_step(", 'model.step = state["microbatch_step"]'),
    (
        Edit(
            'model.step = state["microbatch_step"]',
            "deq_phantom_plugin.patching.tell_step(\n"
            '    model, state["microbatch_step"] - 1, getattr(cfg.model_config, "grad", None),\n'
            "    total=cfg.max_steps)",
            scope="train_step",
            mode="patch",
        ),
    ),
    required=False,
)

RAVEN = Project(
    "seal-rg/recurrent-pretraining",
    '`model_overwrite: {"grad": ...}` in its launch configuration, or `grad` in a `config.json`',
    (DYNAMIC, MINIMAL, FIELDS, RAVEN_FIELDS, TRAINING),
)

ADAPTER = Adapter(
    "seal-rg/recurrent-pretraining",
    ("59e0b69b2d96a59cbbe79c9d5034d89ecb5ab6f6",),
    (RAVEN,),
)
