#!/usr/bin/env bash
# tiny-recursive-model 0.0.15 (PyPI), torch 2.13.0: `TinyRecursiveModel` has two parameters for the
# state it begins with, `output_init_embed` and `latent_init_embed`. They are never trained.
#
# Only the last refinement block has a graph, and a model has at least two blocks, so that neither
# vector ever gets a gradient: with the package's own Trainer both stay where they were drawn, and
# nothing says so. Every other parameter moves. In the sibling class of `trm_dense_loss`, whose loss
# looks at each block, both are trained. Expected by the names and by nn.Parameter: trained in both.
# Seen (how far each moved in one epoch, and the number of parameters that did not move):
#
#   trm              output_init_embed 0.0e+00  latent_init_embed 0.0e+00  unmoved 2
#   trm_dense_loss   both moved                                            unmoved 0
#
# Exit status 0 if that is still so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    torch==2.13.0 tiny-recursive-model==0.0.15 x-transformers==2.31.10 ema-pytorch==0.8.3 \
    accelerate==1.15.0 adam-atan2-pytorch==0.4.1 einops==0.8.2
cat >"$folder/moved.py" <<'PYTHON'
import contextlib
import io
import sys

import torch
from tiny_recursive_model import MLPMixer1D, Trainer, trm, trm_dense_loss


class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return torch.full((4,), index % 3), torch.arange(4) % 3


def moved(module):
    torch.manual_seed(0)
    model = module.TinyRecursiveModel(
        dim=8, num_tokens=3, network=MLPMixer1D(dim=8, depth=1, seq_len=4)
    )
    # No register tokens: that parameter is empty.
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.numel()}
    trainer = Trainer(
        model, Data(), learning_rate=1.0, weight_decay=0.0, batch_size=4, epochs=1,
        max_recurrent_steps=2, warmup_steps=1, halt_prob_thres=2.0, cpu=True,
    )
    trainer.ema_model.copy_params_from_ema_to_model = lambda: None  # the weights as trained
    with contextlib.redirect_stdout(io.StringIO()):
        trainer()
    now = dict(model.named_parameters())
    return {n: float((now[n].detach() - p).abs().max()) for n, p in before.items()}


own, dense = moved(trm), moved(trm_dense_loss)
vectors = ["output_init_embed", "latent_init_embed"]
for name, found in [("trm", own), ("trm_dense_loss", dense)]:
    stuck = [n for n, far in found.items() if far == 0]
    print(f"{name:16}", *(f"{v} {found[v]:.1e} " for v in vectors), f"unmoved {len(stuck)}")
same = {n for n, far in own.items() if far == 0} == set(vectors) and min(dense.values()) > 0
sys.exit(0 if same else "the behaviour has changed")
PYTHON
"$folder/venv/bin/python" "$folder/moved.py"
