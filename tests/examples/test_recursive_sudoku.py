"""examples/experiments/recursive_sudoku.py: puzzles, deep supervision, what is measured."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import sys

import pytest
import torch
from torch import nn

import deq_phantom_plugin as dpp
from conftest import ROOT

pytest.importorskip("yaml")
pytest.importorskip("tensorboard")
trm = pytest.importorskip("tiny_recursive_model")

FOLDER = ROOT / "examples" / "experiments"
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def _on_path():
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))


@pytest.fixture
def harness():
    def load(name):
        return importlib.import_module(f"harness.{name}")

    return load


def main(*argv):
    command, script = (importlib.import_module(n) for n in ("harness.command", "recursive_sudoku"))
    command.main(script.EXPERIMENT, ["--device", "cpu", *argv])


@pytest.fixture
def task(harness):
    def make(run="own", size="smoke", **changes):
        settings = harness("recursive").RecursiveSettings
        plan = harness("plan").load_plan(
            FOLDER / "recursive_sudoku.yaml", size, settings, runs=[run]
        )
        settings = dataclasses.replace(plan.runs[run], **changes)
        return harness("recursive").RecursiveTask(settings, 0, None, CPU)

    return make


# --- puzzles -------------------------------------------------------------------------------------


def is_solution(grid, box):
    """Whether each row, column and box has each digit."""
    size = box**2
    square = grid.view(box, box, box, box)
    boxes = square.transpose(1, 2).reshape(size, size)
    everything = torch.arange(1, size + 1).expand(size, size)
    rows = grid.view(size, size)
    return all(torch.equal(g.sort(dim=1).values, everything) for g in (rows, rows.T, boxes))


@pytest.fixture(scope="module")
def grids():
    """All 4x4 grids, by trying all rows."""
    rows = list(itertools.permutations((1, 2, 3, 4)))
    found = []
    for four in itertools.product(rows, repeat=4):
        if all(len(set(column)) == 4 for column in zip(*four, strict=True)):
            grid = torch.tensor(four).flatten()
            if is_solution(grid, 2):
                found.append(grid)
    return torch.stack(found)


def agreeing(seq, grids):
    """The number of grids that agree with each puzzle."""
    return ((seq[:, None] == grids) | (seq[:, None] == 0)).all(dim=2).sum(dim=1)


def test_all_small_grids(harness, grids):
    found = list(harness("sudoku").solutions([0] * 16, 2))
    assert len(found) == len(set(found)) == 288
    assert set(found) == {tuple(grid) for grid in grids.tolist()}


def test_small_puzzles_have_one_solution_and_no_digit_that_could_go(harness, grids):
    train, test = harness("sudoku").load_puzzles(2, 100, 188, 2, 0, 5)
    seen = [{tuple(grid) for grid in part.labels.tolist()} for part in (train, test)]
    assert (len(seen[0]), len(seen[1])) == (100, 188)
    assert not seen[0] & seen[1]
    for part in (train, test):
        assert (agreeing(part.seq, grids) == 1).all()
        assert ((part.seq == part.labels) | (part.seq == 0)).all()
    for puzzle in train.seq[:20]:
        for place in puzzle.nonzero():
            fewer = puzzle.clone()
            fewer[place] = 0
            assert agreeing(fewer[None], grids) > 1
    eight, _ = harness("sudoku").load_puzzles(2, 40, 2, 3, 8, 5)
    assert ((eight.seq > 0).sum(dim=1) == 8).all()
    other, _ = harness("sudoku").load_puzzles(2, 100, 188, 2, 0, 6)
    assert not torch.equal(other.labels, train.labels)


def another_solution(seq, labels):
    """Whether a 9x9 puzzle has a second solution, by integer programming."""
    optimize = pytest.importorskip("scipy.optimize")
    variable = torch.arange(729).view(9, 9, 9)  # row, column, digit
    boxes = variable.view(3, 3, 3, 3, 9).permute(0, 2, 4, 1, 3)
    groups = [variable, variable.transpose(1, 2), variable.permute(1, 2, 0), boxes]
    once = torch.cat([group.reshape(81, 9) for group in groups])
    matrix = torch.zeros(325, 729).scatter_(1, torch.cat([once, once[:1]]), 1.0)
    mine = torch.arange(81) * 9 + labels - 1
    matrix[-1] = torch.zeros(729).scatter_(0, mine, 1.0)
    low, high = torch.ones(325), torch.ones(325)
    low[-1], high[-1] = 0, 80
    given = torch.zeros(729).scatter_(0, mine[seq > 0], 1.0)
    found = optimize.milp(
        torch.zeros(729).numpy(),
        constraints=optimize.LinearConstraint(matrix.numpy(), low.numpy(), high.numpy()),
        bounds=optimize.Bounds(given.numpy(), torch.ones(729).numpy()),
        integrality=torch.ones(729).numpy(),
    )
    return found.x is not None


def test_large_puzzles_have_one_solution(harness):
    train, test = harness("sudoku").load_puzzles(3, 2, 1, 1, 0, 0)
    for part in (train, test):
        for seq, labels in zip(part.seq, part.labels, strict=True):
            assert is_solution(labels, 3)
            assert ((seq == labels) | (seq == 0)).all()
            assert not another_solution(seq, labels)
            fewer = seq.clone()
            fewer[seq.nonzero()[0]] = 0
            assert another_solution(fewer, labels)


def test_symmetries_keep_the_rules(harness, grids):
    sudoku, draw = harness("sudoku"), torch.Generator().manual_seed(0)
    for box in (2, 3):
        train, _ = sudoku.load_puzzles(box, 3, 1, 1, 0, 0)
        seq, labels = train.draw(60, draw, augment=True)
        assert all(is_solution(grid, box) for grid in labels)
        assert ((seq == labels) | (seq == 0)).all()
        assert len(labels.unique(dim=0)) > (20 if box == 2 else 59)
        assert set((seq > 0).sum(dim=1).tolist()) <= set((train.seq > 0).sum(dim=1).tolist())
        if box == 2:
            assert (agreeing(seq, grids) == 1).all()
        same, known = train.draw(60, draw, augment=False)
        assert {tuple(x) for x in known.tolist()} == {tuple(x) for x in train.labels.tolist()}
        assert {tuple(x) for x in same.tolist()} == {tuple(x) for x in train.seq.tolist()}
    places, _ = sudoku.symmetries(2, 4000, draw)
    # (2 * 2 * 2)**2 orders of the lines, and each of them transposed.
    assert len(places.unique(dim=0)) == 128


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--set", "box=4"], r"own: box=4; expected 2 \(4x4\) or 3 \(9x9\)"),
        (["--set", "train_grids=280"], "280 and 10 4x4 grids; expected 288 together, at most"),
        (["--set", "puzzles=0"], "0 puzzles each, givens=8; expected at least 1"),
        (["--set", "augment=true"], "augment=True makes test grids of other 4x4 ones"),
        (["--set", "grad=ugp"], "own: unknown strategy 'ugp'.*did you mean 'upg'"),
        (["--data", "here"], "--data here, but the puzzles are generated"),
    ],
)
def test_settings_that_cannot_be_are_one_line(argv, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        main("--runs", "own", "--out", str(tmp_path), *argv)


# --- training ------------------------------------------------------------------------------------


def test_deep_supervision_is_the_plain_loop_over_calls(task):
    made = task(halt=False, supervisions=3)
    for number in range(6):
        made.step(number)
    dpp.disable()
    plain = task_model(made)
    optimizer = type(made.optimizer)(
        plain.parameters(), lr=1.0, betas=(0.9, 0.95), weight_decay=1.0
    )
    average = {name: p.detach().clone() for name, p in plain.named_parameters()}
    for number in range(6):
        if number % 3 == 0:  # all puzzles begin at once, and end at once
            draw = torch.Generator().manual_seed(number)
            seq, labels = made.train_set.draw(8, draw, augment=False)
            state = plain.get_initial()
        optimizer.param_groups[0]["lr"] = 0.001 * min(1, (number + 1) / 4)
        optimizer.zero_grad()
        loss, _, *state, _, _ = plain(seq, *state, labels=labels)
        (loss / 8).backward()
        optimizer.step()
        for name, p in plain.named_parameters():
            average[name] = p.detach() * 0.1 + average[name] * 0.9 if number else p.detach().clone()
    dpp.enable("tiny_recursive_model")
    averaged = dict(made.model.averaged.module.named_parameters())
    for name, p in made.model.model.named_parameters():
        torch.testing.assert_close(p, dict(plain.named_parameters())[name], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(averaged[name], average[name], rtol=1e-4, atol=1e-6)


def task_model(made):
    """The model that a task begins with, made by hand."""
    s = made.settings
    torch.manual_seed(0)
    return trm.TinyRecursiveModel(
        dim=s.width,
        num_tokens=5,
        network=trm.MLPMixer1D(
            dim=s.width, depth=1, seq_len=16, expansion_factor=4.0, expansion_factor_token=4
        ),
        num_refinement_blocks=3,
        num_latent_refinements=2,
        halt_loss_weight=0.5,
    )


def test_hidden_sizes_are_counted_in_what_comes_in(task):
    made = task(width=48, registers=4, expansion=3)
    over_cells, over_channels = (part.fn for part in made.model.model.network[0])
    assert [over_cells[i].weight.shape[:2] for i in (0, 3)] == [(60, 20), (20, 60)]
    assert [over_channels[i].weight.shape for i in (0, 3)] == [(144, 48), (48, 144)]


def test_its_own_training_has_a_name(tmp_path, harness):
    main("--runs", "own", "tbptt-1", "tbptt-2", "--out", str(tmp_path))
    records = harness("results").load_records(tmp_path / "smoke")
    times = ("seconds", "ms_per_step")
    own, one, two = (
        [{k: v for k, v in row.items() if k not in times} for row in record.history]
        for record in records
    )
    assert own == one != two


@pytest.mark.filterwarnings("ignore::deq_phantom_plugin.ConvergenceWarning")
def test_a_schedule_changes_what_a_step_costs(task):
    made = task("all-then-1")
    memory = {}
    for number in range(8):
        made.step(number)
        memory[number] = made.evaluate(number + 1)["memory"]
    assert memory[0] == memory[5] > 2 * memory[6] == 2 * memory[7]
    assert memory[7] == pytest.approx(task("own").evaluate(0)["memory"], rel=0.02)


def test_puzzles_halt_where_the_model_takes_them_for_solved(task):
    made, draw = task(explore=0.0, supervisions=3), torch.Generator().manual_seed(0)
    halt = torch.tensor([0.2, 0.9, 0.5, 0.9, 0.1, 0.1, 0.9, 0.0])
    made.model.calls = torch.tensor([1, 1, 1, 2, 3, 2, 3, 1])
    assert made._halts(halt, draw).tolist() == [False, True, False, True, True, False, True, False]
    made.settings = dataclasses.replace(made.settings, halt=False)
    assert made._halts(halt, draw).nonzero().flatten().tolist() == [4, 6]
    made.settings = dataclasses.replace(made.settings, halt=True, explore=1.0, supervisions=8)
    made.model.calls = torch.ones(8, dtype=torch.long)
    assert not made._halts(torch.ones(8), draw).any()  # at least two calls
    made.model.calls = torch.full((8,), 4)
    assert 0 < sum(made._halts(torch.ones(8), draw).sum() for _ in range(20)) < 160


def test_those_that_have_not_halted_go_on(task):
    made = task(batch_size=4)
    made.step(0)
    learner = made.model
    learner.halted = torch.tensor([False, True, False, False])
    seq, outputs = learner.seq.clone(), learner.outputs.clone()
    made._replace_halted(torch.Generator().manual_seed(3))
    assert [torch.equal(a, b) for a, b in zip(seq, learner.seq, strict=True)] == [
        True,
        False,
        True,
        True,
    ]
    assert learner.calls.tolist() == [1, 0, 1, 1]
    states, _ = made._states(learner.model)
    assert torch.equal(states[[0, 2, 3]], outputs[[0, 2, 3]])
    assert torch.equal(states[1], learner.model.output_init_embed.expand(16, -1))
    (grad,) = torch.autograd.grad(states.sum(), learner.model.output_init_embed)
    assert torch.equal(grad, torch.full((16,), 16.0))  # of one puzzle's cells


def test_large_puzzles_by_the_recipe_of_the_paper(task):
    small = {"width": 8, "batch_size": 3, "train_grids": 2, "test_grids": 2, "steps": 2}
    made = task(size="paper", **small, supervisions=2, warmup=0, lr=0.01)
    assert made.train_set.seq.shape == (2, 81)
    before = [p.detach().clone() for p in made.model.model.parameters()]
    seen = []
    for number in range(2):
        assert made.step(number).isfinite()
        seen.append(made.model.seq.clone())
    assert made.model.outputs.shape == (3, 97, 8)  # with the registers
    # Puzzles are augmented when they come, and stay for all their calls.
    assert not any(torch.equal(a, b) for a in seen[0] for b in made.train_set.seq)
    assert torch.equal(*seen)
    # Initial vectors have no gradient where the last block alone has a graph.
    changed = [
        not torch.equal(a, b) for a, b in zip(before, made.model.model.parameters(), strict=True)
    ]
    names = [name for name, _ in made.model.model.named_parameters()]
    still = {name for name, moved in zip(names, changed, strict=True) if not moved}
    assert still == {"output_init_embed", "latent_init_embed"}
    assert 0 <= made.evaluate(2)["cells"] <= 1


# --- what is measured ----------------------------------------------------------------------------


def test_residual_and_radius_are_those_of_a_dense_jacobian(task):
    made = task("own", width=6, radius_puzzles=2)
    for number in range(6):
        made.step(number)
    made.model.double()
    found = made._at_the_ends()
    model = made.model.averaged.module
    residuals, radii = [], []
    for seq in made.test_set.seq[:2]:
        inputs = model.input_embed(seq[None])
        state = torch.stack([v.expand(1, 16, 6) for v in model.get_initial()])

        def block(state, inputs=inputs):
            outputs, latents = state
            for _ in range(2):
                latents = model.network(outputs + latents + inputs)
            return torch.stack([model.network(outputs + latents), latents])

        with torch.no_grad():
            for call in range(3):
                for _ in range(3):
                    state = block(state)
                if call in (0, 2):
                    image = block(state)
                    residuals.append(float((image - state).norm() / image.norm()))
        jacobian = torch.autograd.functional.jacobian(block, state).view(192, 192)
        radii.append(float(torch.linalg.eigvals(jacobian).abs().max()))
    first, end = sum(residuals[::2]) / 2, sum(residuals[1::2]) / 2
    assert found["residual_first"] == pytest.approx(first, rel=1e-6)
    assert found["residual"] == pytest.approx(end, rel=1e-6)
    assert found["rho"] == pytest.approx(sum(radii) / 2, rel=0.05)


@pytest.mark.filterwarnings("ignore::deq_phantom_plugin.ConvergenceWarning")
def test_the_gradient_is_compared_with_backpropagation_through_the_whole_loop(task):
    for run in ("own", "tbptt-2", "tbptt-all"):
        made = task(run)
        for number in range(3):
            made.step(number)
        made.optimizer.zero_grad()
        made._call(made.model.model)[0].backward()
        named = dict(made.model.model.named_parameters())
        ours = {name: p.grad for name, p in named.items() if p.grad is not None}
        dpp.disable()
        plain = task_model(made)
        plain.load_state_dict({name: p.detach() for name, p in named.items()}, strict=True)
        inputs = plain.input_embed(made.model.seq)
        new = (made.model.calls == 0)[:, None, None]
        carried = (made.model.outputs, made.model.latents)
        state = [torch.where(new, a, b) for a, b in zip(plain.get_initial(), carried, strict=True)]
        for _ in range(2):
            state = plain.refine_latent_then_output_once(inputs, *state)
        # What its own code does with its last block, after two that have a graph as well.
        plain.num_refinement_blocks = 1
        plain(made.model.seq, *state, labels=made.model.labels)[0].backward()
        dpp.enable("tiny_recursive_model")
        a, b = (
            torch.cat([grads.get(n, torch.zeros_like(p)).flatten() for n, p in named.items()])
            for grads in (ours, {n: p.grad / 8 for n, p in plain.named_parameters()})
        )
        found = made.evaluate(3)
        assert found["cosine"] == pytest.approx(float(a @ b / (a.norm() * b.norm())), rel=1e-4)
        assert found["length"] == pytest.approx(float(a.norm() / b.norm()), rel=1e-4)
        if run == "tbptt-all":
            assert (found["cosine"], found["length"]) == pytest.approx((1, 1), abs=1e-5)


def test_accuracy_counts_whole_puzzles_and_blanks(task, monkeypatch):
    made = task()
    test = made.test_set
    answer = nn.functional.one_hot(test.labels, 5).float()
    blank = (test.seq[0] == 0).nonzero()[0]
    given = (test.seq[1] > 0).nonzero()[0]
    for row, place in ((0, blank), (1, given)):
        answer[row, place] = answer[row, place].roll(1, dims=-1)
    table = {tuple(seq): guess for seq, guess in zip(test.seq.tolist(), answer, strict=True)}

    def forward(seq, outputs, latents):
        return outputs, latents, torch.stack([table[tuple(x)] for x in seq.tolist()]), None

    monkeypatch.setattr(made.model.averaged.module, "forward", forward)
    found = made._accuracy()
    assert found["solved"] == pytest.approx(18 / 20)
    assert found["cells"] == pytest.approx(1 - 1 / int((test.seq == 0).sum()))


def test_peak_memory_of_what_is_known(harness):
    peak, before = harness("memory").PeakMemory, torch.ones(1000)
    with peak() as memory:
        a = before * 2
        b = a + 1
        c = a.view(10, 100)  # the same bytes
        del a
        b += 1
        del b
        d = c + before.view(10, 100)
    assert memory.peak == 8000
    del c, d
    for depth in (3, 6):
        x = torch.ones(1000, requires_grad=True)
        with peak() as memory:
            y = x
            for _ in range(depth):
                y = y.tanh()  # saves its result
            loss = y.sum()
        assert memory.peak == 4000 * depth + 4
        del y, loss


@pytest.mark.filterwarnings("ignore::deq_phantom_plugin.ConvergenceWarning")
def test_memory_grows_with_the_blocks_that_have_a_graph(task):
    def memory(run, **changes):
        return task(run, width=32, batch_size=16, **changes).evaluate(0)["memory"]

    one, two, three = (memory(run) for run in ("own", "tbptt-2", "tbptt-all"))
    assert two - one == pytest.approx(three - two, rel=0.1)
    assert two - one > 0.7 * one
    # One graph, and what else they hold: a term of the series, a vector for each product.
    assert memory("npg") < 1.3 * one
    few, more = (memory("ift", grad=f"ift(tol=1e-9, max_iter={n})") for n in (4, 8))
    assert one < few < more < two


def test_a_report_is_made_beside_training_and_leaves_it_as_it_is(task):
    plain, watched = (
        task(),
        task(report_grads=("exact", "tbptt(k=2)"), eval_every=2, report_every=2),
    )
    for step in range(3):
        found = watched.evaluate(step)
        assert ("report_cosine" in found) == (step != 1)
        if step != 1:
            # The model has a gradient of its own, which is that of one block.
            assert found["report_cosine"] == found["cosine of tbptt(k=1)"] < 1
            assert found["report_cosine"] < found["cosine of tbptt(k=2)"] < 1
            assert found["cosine of exact"] == pytest.approx(1, abs=1e-4)
        torch.testing.assert_close(watched.step(step), plain.step(step), rtol=0, atol=0)
    for ours, theirs in zip(watched.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
