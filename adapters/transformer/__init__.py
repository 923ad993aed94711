"""Deep equilibrium language models as Transformers models, with a gradient by name.

Source: Bai, Kolter & Koltun, "Deep Equilibrium Models", NeurIPS 2019, arXiv:1909.01377. The states
of all tokens are the equilibrium of one weight-tied decoder block, into which the embeddings of the
tokens are injected in every evaluation.

    config = DEQTransformerConfig(vocab_size=256, hidden_size=64, num_attention_heads=4, grad="upg")
    model = DEQTransformerForCausalLM(config)
    model(input_ids, labels=input_ids).loss.backward()
    model.set_grad("npg(k=9)")
    model.generate(input_ids, max_new_tokens=20)

Importing this module registers both classes, so `AutoModelForCausalLM.from_pretrained` loads what
`save_pretrained` has saved. Pass `SetStep()` to a `Trainer` if anything depends on the step.

The files import one another only in this order: versions, solve, inputs, label_smoothing, jac_loss,
config, block, pretrained, model, causal. `layer/` has `deq_from_layer`, and uses the first two of
these. `trainer` has `SetStep`.
"""

from deq_phantom_plugin._plumbing.extras import require

require("transformers.modeling_utils", "text")
from .causal import DEQCausalLMOutput, DEQTransformerForCausalLM  # noqa: E402
from .config import DEQTransformerConfig  # noqa: E402
from .jac_loss import Joins as Joins  # noqa: E402
from .layer import EquilibriumLayer, deq_from_layer  # noqa: E402
from .model import DEQModelOutput, DEQTransformerModel  # noqa: E402
from .pretrained import DEQTransformerPreTrainedModel as DEQTransformerPreTrainedModel  # noqa: E402
from .solve import EquilibriumInfo  # noqa: E402
from .trainer import SetStep  # noqa: E402

__all__ = [
    "DEQCausalLMOutput",
    "DEQModelOutput",
    "DEQTransformerConfig",
    "DEQTransformerForCausalLM",
    "DEQTransformerModel",
    "EquilibriumInfo",
    "EquilibriumLayer",
    "SetStep",
    "deq_from_layer",
]
