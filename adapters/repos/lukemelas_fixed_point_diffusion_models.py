"""lukemelas/fixed-point-diffusion-models: a diffusion transformer with one block in a loop.

Each call of `DiT._forward_fixed_point` draws two numbers from Python's `random`: n evaluations
without a graph, and k with a graph. Both draws stay, even if the named gradient does not use k, so
later random numbers do not change. With adaptive sampling, the repository's controller gives both
numbers. One evaluation of our loop is one `forward_pass`.

For the first n evaluations, the repository builds a graph and then detaches from it. Its comment
says that DDP needs this. The patch builds no graph there. Without care, DDP would then miss the
gradients of weights that autocast has cast without autograd and cached. `patching.Loop` lets
autocast cast them again.

The repository's training detaches the state at which the loop begins. Here the state is detached
too, unless the gradient is that of the whole loop. A solution from the last call
(`fixed_point_reuse_solution`) is always detached, since the graph of that call is freed.
"""

from __future__ import annotations

from deq_phantom_plugin.patching.adapter import Adapter, Edit, Project, SeamFile

SCOPE = "DiT._forward_fixed_point"

FPDM = Project(
    "lukemelas/fixed-point-diffusion-models",
    "`--grad ...` of train.py, where an empty one is the repository's own training",
    (
        SeamFile(
            "the model",
            ("class DiT(", "def _forward_fixed_point_blocks("),
            (
                Edit(
                    "self.last_solution = None",
                    "self.loop = deq_phantom_plugin.patching.Loop({grad})",
                    scope="DiT.__init__",
                ),
                Edit(
                    "if self.adaptive:",
                    "if num_iterations is None:\n    return forward_pass(x)",
                    "before",
                    scope="DiT._forward_fixed_point_blocks",
                ),
                Edit(
                    "with nullcontext():",
                    "begins = (self.fixed_point_no_grad_min_iters,"
                    " self.fixed_point_with_grad_min_iters)\n"
                    "ends = (self.fixed_point_no_grad_max_iters,"
                    " self.fixed_point_with_grad_max_iters)\n"
                    "without, carrying = [\n"
                    "    self.iteration_controller.get() if self.adaptive else drawn\n"
                    "    for drawn in map(random.randint, begins, ends)]\n"
                    "cut = self.loop.is_own or init_solution is self.last_solution\n"
                    "x = self.loop(\n"
                    "    lambda x: self._forward_fixed_point_blocks(\n"
                    "        x, x_input_injection, c, None),\n"
                    "    init_solution.detach() if cut else init_solution,\n"
                    "    steps=without + carrying, graph=carrying)",
                    "replace",
                    through="x = self._forward_fixed_point_blocks(",
                    scope=SCOPE,
                ),
            ),
            {
                SCOPE: ("e8a37c1b15e0fe03",),
                "DiT._forward_fixed_point_blocks": ("088e5e00d4711b04",),
            },
        ),
        SeamFile(
            "the training script",
            ("class Args(Tap)", "DiT_models[args.model](", "def update_ema("),
            (
                Edit(
                    "fixed_point_pre_post_timestep_conditioning: bool",
                    "grad: str = {grad}",
                    scope="Args",
                    mode="patch",
                ),
                Edit(
                    "ema = deepcopy(model)",
                    "if args.fixed_point:\n"
                    "    deq_phantom_plugin.patching.switch(model, args.grad or None)",
                    "before",
                    scope="main",
                    mode="patch",
                ),
                Edit(
                    "loss_dict =",
                    "deq_phantom_plugin.patching.tell_step(\n"
                    "    model, train_steps, None, total=args.epochs * len(loader))",
                    "before",
                    scope="main",
                    mode="patch",
                ),
            ),
            required=False,
        ),
    ),
)

ADAPTER = Adapter(
    "lukemelas/fixed-point-diffusion-models",
    ("519e1286ba27c34e177e05962c5d9e66edce31e6",),
    (FPDM,),
)
