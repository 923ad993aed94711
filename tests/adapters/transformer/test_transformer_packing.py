"""Documents of one row, padding, and masks that somebody prepared."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("torchdeq")
pytest.importorskip("transformers")

from transformers import AttentionInterface, AttentionMaskInterface, DataCollatorWithFlattening
from transformers.masking_utils import sdpa_mask

from deq_phantom_plugin.adapters.transformer.layer import CACHE
from language_models import VOCAB, make, padded, tokens

IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["sdpa", "eager"])


def documents(*lengths):
    """Return documents, the row they make, and its positions."""
    parts = [tokens(1, length) for length in lengths]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    return parts, torch.cat(parts, dim=1), positions


def alone(model, parts):
    return torch.cat([model(part).logits for part in parts], dim=1)


def parameter_gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in model.parameters()]


def close(found, expected, rtol=1e-5, atol=1e-6):
    # The rotation is Transformers' own, which computes its angles in float32.
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


@IMPLEMENTATIONS
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("ones", [False, True], ids=["no mask", "ones"])
@pytest.mark.parametrize("use_cache", [None, False, True])
def test_documents_of_a_row_do_not_see_one_another(implementation, train, ones, use_cache):
    model = make(attn_implementation=implementation, grad="npg").train(train)
    parts, row, positions = documents(6, 1, 1, 4)
    mask = torch.ones_like(row) if ones else None
    with torch.set_grad_enabled(train):
        out = model(row, attention_mask=mask, position_ids=positions, use_cache=use_cache)
        close(out.logits, alone(model, parts))
        joint = model(row, use_cache=use_cache).logits
    assert (joint - out.logits).abs().max() > 1e-2  # as one document they do


@IMPLEMENTATIONS
def test_their_gradient_is_the_sum_of_those_of_each(implementation):
    model = make(attn_implementation=implementation, grad="ift(tol=1e-12, max_iter=200)")
    parts, row, positions = documents(5, 3, 4)
    weight = torch.randn(1, 12, VOCAB, dtype=torch.float64)
    found = parameter_gradients(model, (weight * model(row, position_ids=positions).logits).sum())
    expected = parameter_gradients(model, (weight * alone(model, parts)).sum())
    for ours, theirs in zip(found, expected, strict=True):
        close(ours, theirs)


def test_their_loss_predicts_no_document_from_another():
    model = make(grad="npg")
    parts, row, positions = documents(5, 3, 4)
    losses = [model(part, labels=part).loss * (part.shape[1] - 1) for part in parts]
    loss = model(row, labels=row, position_ids=positions).loss
    close(loss, sum(losses) / 9)
    scored = torch.cat([F.pad(part[:, 1:], (0, 1), value=-100) for part in parts], dim=1)
    close(model(row, shift_labels=scored, position_ids=positions).loss, loss)


@pytest.mark.parametrize("side", ["left", "right"])
@IMPLEMENTATIONS
def test_documents_beside_padding(implementation, side):
    model = make(attn_implementation=implementation, grad="npg")
    parts, row, positions = documents(4, 3)
    other = tokens(1, 10)
    width, at = (3, 0), slice(3, None)
    if side == "right":
        width, at = (0, 3), slice(None, 7)
    batch = torch.cat([F.pad(row, width), other])
    mask = torch.cat([F.pad(torch.ones_like(row), width), torch.ones_like(other)])
    places = torch.cat([F.pad(positions, width), torch.arange(10)[None]])
    logits = model(batch, attention_mask=mask, position_ids=places).logits
    close(logits[:1, at], alone(model, parts))
    close(logits[1:], model(other).logits)


@pytest.mark.parametrize(
    "told",
    [
        {"return_position_ids": True},
        {"return_position_ids": False, "return_flash_attn_kwargs": True},
        {"return_position_ids": False, "return_seq_idx": True},
        {"return_flash_attn_kwargs": True, "return_seq_idx": True},
        {"return_position_ids": True, "position_ids_start": 2},
    ],
    ids=lambda told: ", ".join(told),
)
def test_whatever_the_collator_of_transformers_says(told):
    model = make(grad="npg")
    parts, _, _ = documents(5, 1, 4)
    batch = DataCollatorWithFlattening(return_tensors="pt", **told)(
        [{"input_ids": part[0]} for part in parts]
    )
    out = model(**batch)
    close(out.logits, alone(model, parts))
    losses = [model(p, labels=p).loss * (p.shape[1] - 1) for p in parts if p.shape[1] > 1]
    close(out.loss, sum(losses) / 7)
    with torch.no_grad():
        close(model.eval()(**batch).logits, alone(model, parts))


@torch.no_grad()
def test_a_gap_begins_no_document():
    model = make().eval()
    ids = tokens(1, 6)
    gap = torch.tensor([[0, 1, 2, 7, 8, 9]])
    changed = ids.clone()
    changed[0, 0] = ids[0, 0] % (VOCAB - 1) + 1
    later = [model(x, position_ids=gap).logits[:, 3:] for x in (ids, changed)]
    assert (later[0] - later[1]).abs().max() > 1e-3


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_a_document_that_begins_after_a_cache_does_not_see_it(implementation):
    model = make(attn_implementation=implementation).eval()
    parts, row, positions = documents(5, 4)
    cache = model(row[:, :3])[CACHE]
    out = model(row[:, 3:], position_ids=positions[:, 3:], **{CACHE: cache})
    close(out.logits, alone(model, parts)[:, 3:])
    with pytest.raises(ValueError, match="the cache holds rows of several documents"):
        model(tokens(1, 1), **{CACHE: out[CACHE]})


@torch.no_grad()
def test_a_cache_of_several_documents_is_not_gone_on_with():
    model = make(tight=False).eval()
    _, row, positions = documents(5, 4)
    cache = model(row, position_ids=positions, use_cache=True)[CACHE]
    with pytest.raises(ValueError, match="the cache holds rows of several documents"):
        model(tokens(1, 1), **{CACHE: cache})
    with pytest.raises(ValueError, match="the cache holds rows of several documents"):
        model.generate(row, position_ids=positions, max_new_tokens=3)


@torch.no_grad()
def test_padding_is_no_document_of_a_cache():
    """As `generate` counts positions where the prompt is padded and given in pieces."""
    model = make().eval()
    ids, mask = padded(tokens(2, 9), 5)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    whole = model(ids, attention_mask=mask).logits
    cache, parts = None, []
    for begin, end in ((0, 3), (3, 7), (7, 9)):
        part = slice(begin, end)
        out = model(
            ids[:, part],
            attention_mask=mask[:, :end],
            position_ids=positions[:, part],
            **{CACHE: cache},
        )
        cache = out[CACHE]
        parts.append(out.logits)
    close(torch.cat(parts, 1)[mask == 1], whole[mask == 1])


def test_padding_in_the_middle_of_a_row_parts_nothing():
    """As generation goes on after right padding, an assistant's tokens several at once."""
    model = make().eval()
    ids, _ = padded(tokens(length=7), 4, side="right")
    ids = torch.cat([ids, tokens(length=3)], dim=1)
    mask = torch.ones_like(ids)
    mask[0, 3:7] = 0
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)  # as `generate` makes them
    with torch.no_grad():
        found = model(ids, attention_mask=mask, position_ids=positions).logits
        alone = model(torch.cat([ids[:1, :3], ids[:1, 7:]], dim=1)).logits
    close(found[0, 7:], alone[0, 3:])
    close(found[0, :3], alone[0, :3])


@torch.no_grad()
def test_assisted_generation_after_right_padding_is_greedy():
    torch.manual_seed(0)
    model = make(initializer_range=1.0).eval()
    ids, mask = padded(tokens(length=7), 4, side="right")
    settings = {"attention_mask": mask[:1], "max_new_tokens": 8, "do_sample": False}
    greedy = model.generate(ids[:1], **settings)
    assert torch.equal(model.generate(ids[:1], assistant_model=model, **settings), greedy)


@torch.no_grad()
def test_the_limit_is_of_a_document():
    model = make(tight=False, max_position_embeddings=6).eval()
    _, row, positions = documents(6, 5)
    assert model(row, position_ids=positions).logits.shape == (1, 11, VOCAB)
    with pytest.raises(ValueError, match="a sequence of 11 tokens; expected at most 6"):
        model(row)
    _, row, positions = documents(3, 7, 2)
    with pytest.raises(ValueError, match="a sequence of 7 tokens; expected at most 6"):
        model(row, position_ids=positions)
    cache = model(row[:, :3])[CACHE]
    with pytest.raises(ValueError, match="a sequence of 7 tokens; expected at most 6"):
        model(
            tokens(1, 6),
            position_ids=torch.tensor([[3, 4, 5, 6, 0, 1]]),
            **{CACHE: cache},
        )


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"position_ids": torch.arange(5)[None]}, r"position_ids of shape \(1, 5\); expected"),
        ({"position_ids": torch.arange(6)}, r"position_ids of shape \(6,\)"),
        ({"cu_seq_lens_q": [0, 2, 6]}, r"cu_seq_lens_q with tokens of shape \(2, 6\)"),
        ({"seq_idx": torch.zeros(3, 6)}, r"seq_idx of shape \(3, 6\)"),
        ({"attention_mask": torch.ones(2, 5)}, r"shape \(2, 5\); expected \(2, 6\)"),
        ({"attention_mask": torch.ones(2, 6, 6)}, r"shape \(2, 6, 6\); expected \(2, 6\)"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 2, 2, 2]] * 2)}, "other values than 0 and 1"),
        ({"attention_mask": torch.zeros(2, 6) - torch.inf}, "other values than 0 and 1"),
        ({"attention_mask": {"sliding_attention": None}}, "expected full_attention alone"),
        ({"attention_mask": [[1] * 6] * 2}, "type list; expected a tensor"),
        ({"attention_mask": torch.ones(2, 1, 6, 5)}, r"prepared attention_mask of shape"),
        ({"attention_mask": torch.ones(3, 1, 6, 6)}, r"prepared attention_mask of shape"),
        ({"attention_mask": torch.ones(2, 1, 6, 6).long()}, "torch.int64; expected bool"),
        ({"attention_mask": torch.ones(2, 1, 6, 6).tril()}, "zeros and ones in floating"),
    ],
)
def test_what_cannot_be_read_in_one_way_is_refused(told, message):
    with pytest.raises(ValueError, match=message):
        make(tight=False)(tokens(2, 6), **told)
    with pytest.raises(ValueError, match="rise from 0 to 6"):
        make(tight=False)(tokens(1, 6), cu_seq_lens_q=[0, 3, 5])


# --- masks that somebody prepared ----------------------------------------------------------------


@IMPLEMENTATIONS
@pytest.mark.parametrize("kind", ["bool", "added", "infinite", "heads", "dict"])
@pytest.mark.parametrize("length", [2, 7], ids=["as many rows as tokens", "more tokens"])
def test_a_prepared_mask_is_that_of_two_dimensions(implementation, kind, length):
    model = make(attn_implementation=implementation, grad="npg")
    ids, mask = padded(tokens(2, length), length // 2)
    keep = torch.ones(length, length).tril().bool() & mask[:, None, None].bool()
    prepared = keep
    if kind in ("added", "infinite"):
        least = torch.finfo(torch.float32).min if kind == "added" else -torch.inf
        prepared = torch.zeros(()).where(keep, least)
    elif kind == "heads":
        prepared = keep.expand(2, 2, length, length)
    elif kind == "dict":
        prepared = {"full_attention": keep}
    losses = [
        (model(ids, attention_mask=m).logits[mask == 1] ** 2).mean() for m in (mask, prepared)
    ]
    close(losses[1], losses[0])
    expected, found = (parameter_gradients(model, loss) for loss in losses)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.isfinite().all()
        close(ours, theirs)


@torch.no_grad()
def test_a_prepared_mask_says_all():
    """A prefix that is seen in both directions, and two documents by their mask."""
    model = make().eval()
    parts, row, positions = documents(4, 3)
    keep = torch.block_diag(torch.ones(4, 4).tril(), torch.ones(3, 3).tril()).bool()[None, None]
    close(model(row, attention_mask=keep, position_ids=positions).logits, alone(model, parts))
    both = torch.ones(1, 1, 7, 7).tril().bool()
    both[..., :4, :4] = True
    seen = model(row, attention_mask=both).logits
    assert (seen[:, :3] - model(row).logits[:, :3]).abs().max() > 1e-3


# --- queries that see nothing ---------------------------------------------------------------------


def plain_softmax(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Attention that gives NaN where a query sees no key, as some kernels do."""
    scores = query @ key.mT * scaling
    keep = attention_mask
    if keep is None:
        keep = torch.ones(scores.shape[-2:]).tril().bool()
    boolean = keep.dtype == torch.bool
    scores = scores.masked_fill(~keep, -torch.inf) if boolean else scores + keep
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None


def adding_mask(*args, **kwargs):
    mask = sdpa_mask(*args, **kwargs)
    return mask if mask is None else torch.zeros(()).where(mask, -torch.inf).double()


@pytest.fixture
def strict_kernels(monkeypatch):
    for name, made in (("strict", sdpa_mask), ("strict added", adding_mask)):
        AttentionInterface.register(name, plain_softmax)
        AttentionMaskInterface.register(name, made)
    yield
    for name in ("strict", "strict added"):
        AttentionInterface._global_mapping.pop(name)
        AttentionMaskInterface._global_mapping.pop(name)


@pytest.mark.parametrize("implementation", ["strict", "strict added"])
@pytest.mark.parametrize("grad", ["upg", "npg", "jfb", "ift", "bptt(steps=9)"])
@pytest.mark.parametrize("side", ["left", "right", "all of a row"])
def test_queries_that_see_nothing_stay_out_of_the_gradient(
    strict_kernels, implementation, grad, side
):
    ids, mask = padded(tokens(2, 6), 6 if "all" in side else 2, "left" if "all" in side else side)
    found = {}
    for name in (implementation, "eager"):
        torch.manual_seed(3)
        model = make(grad=grad, attn_implementation=name, jac_reg_weight=0.1)
        out = model(ids, attention_mask=mask, labels=ids)
        found[name] = [out.loss, *parameter_gradients(model, out.loss)]
    for ours, theirs in zip(found[implementation], found["eager"], strict=True):
        assert theirs.isfinite().all()
        close(ours, theirs, rtol=1e-4)


@torch.no_grad()
def test_a_kernel_without_masks_is_refused_where_one_is_needed():
    AttentionInterface.register("maskless", plain_softmax)
    try:
        model = make(tight=False, attn_implementation="maskless").eval()
        ids, mask = padded(tokens(), 2)
        with pytest.raises(ValueError, match="'maskless' has no mask"):
            model(ids, attention_mask=mask)
        with pytest.raises(ValueError, match="'maskless' has no mask"):
            model(ids, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]))
        assert model(ids).logits.isfinite().all()
    finally:
        AttentionInterface._global_mapping.pop("maskless")
