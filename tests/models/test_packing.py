"""Cells without padding: the same numbers as in the padded batch, and nothing computed for padding."""

import backbone_cases
import pytest
import torch
from backbone_cases import NAMES, batch, model_of
from test_backbones import VARIANTS, ids_of
from torch import nn

from bmfm_pipeline.models.attention import PackedCells, _attend_varying, attend, attention_allowed, visibility
from bmfm_pipeline.models.packing import Packing

LENGTHS = (12, 7, 12, 3, 2)


def everywhere(mask):
    """The flat positions that are not padding, for both fields."""
    found = torch.nonzero(mask.flatten()).flatten()
    return {"genes": found, "expressions": found}


def pulls(model):
    return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}


def both_ways(model, ids, mask, **more):
    """(output, logits at real positions, gradients) of the packed and of the padded pass."""
    positions = everywhere(mask)
    for asked in (positions, None):
        model.zero_grad()
        output = model(ids, mask, positions=asked, output_hidden_states=True, **more)
        logits = output.logits
        if asked is None:
            logits = {
                key: value.flatten(0, 1)[positions["genes"]] if value.dim() == 3 and not key.endswith("wced") else value
                for key, value in logits.items()
            }
        sum(value.square().mean() for value in logits.values()).backward()
        yield output, logits, pulls(model)


def close(a, b, tolerance=1e-5):
    return torch.allclose(a, b, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("name", "changes"), VARIANTS, ids=ids_of)
def test_without_padding_scores_states_and_gradients_are_those_of_the_padded_batch(name, changes):
    model = model_of(name, **changes).train()
    ids, mask = batch(5, 12, LENGTHS)
    ids[0, 1, 4] = 0.0
    (packed, scores, gradients), (padded, wanted, wanted_gradients) = both_ways(model, ids, mask)
    assert list(scores) == list(wanted) and gradients.keys() == wanted_gradients.keys()
    assert all(close(scores[key], wanted[key]) for key in wanted)
    real = mask.bool()
    for state, other in zip(packed.hidden_states, padded.hidden_states, strict=True):
        assert state.shape == other.shape and close(state[real], other[real])
        assert not state[~real].any()
    assert close(packed.last_hidden_state[real], padded.last_hidden_state[real])
    assert close(packed.embeddings, padded.embeddings)
    assert all(close(gradients[key], wanted_gradients[key]) for key in wanted_gradients)


@pytest.mark.parametrize("name", NAMES)
def test_linear_layers_of_the_encoder_never_meet_padding(name):
    model = model_of(name)
    ids, mask = batch(5, 12, LENGTHS)
    rows = set()
    inside = [
        module
        for key, module in model.backbone.named_modules()
        if isinstance(module, nn.Linear) and "pooler" not in key and "aux_proj" not in key
    ]
    for module in inside:
        module.register_forward_hook(lambda _, given, __: rows.add(given[0].shape[:-1].numel()))
    tail = model.config.num_memory_tokens * len(LENGTHS) if name == "scllama" else 0
    model(ids, mask, positions=everywhere(mask))
    # The value encoder sees the positions before memory tokens join them.
    assert rows == {sum(LENGTHS), sum(LENGTHS) + tail}
    rows.clear()
    model(ids, mask)
    assert rows == {60, 60 + tail}


@pytest.mark.parametrize("name", NAMES)
def test_checkpointed_and_given_embeddings_can_be_packed(name):
    ids, mask = batch(5, 12, LENGTHS)
    saving = model_of(name).train()
    saving.gradient_checkpointing_enable()
    (_, scores, gradients), (_, wanted, wanted_gradients) = both_ways(saving, ids, mask)
    assert all(close(scores[key], wanted[key]) for key in wanted)
    assert all(close(gradients[key], wanted_gradients[key]) for key in wanted_gradients)
    model = model_of(name)
    with torch.no_grad():
        vectors = model.backbone.embeddings(ids)
        packed = model(inputs_embeds=vectors, attention_mask=mask, positions={})
        padded = model(ids, mask)
    assert all(close(packed.logits[key], padded.logits[key]) for key in ("celltype", "donor", "expressions_wced"))
    assert close(packed.last_hidden_state[1, :7], padded.last_hidden_state[1, :7])


@pytest.mark.parametrize("name", NAMES)
def test_dropout_is_drawn_alike_for_a_batch_that_is_packed_again(name):
    ids, mask = batch(5, 12, LENGTHS)
    longer, wider = torch.nn.functional.pad(ids, (0, 20), value=2.0), torch.nn.functional.pad(mask, (0, 20))
    model = model_of(name, hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.4).train()
    found = []
    for one, its_mask in ((ids, mask), (longer, wider)):
        torch.manual_seed(3)
        found.append(model(one, its_mask, positions={}).logits["celltype"])
    torch.manual_seed(4)
    other = model(ids, mask, positions={}).logits["celltype"]
    assert close(*found) and not close(found[0], other, 1e-3)


@pytest.mark.parametrize("name", ["scbert", "scmodernbert", "scllama"])
def test_pairwise_masks_attention_weights_and_holes_keep_the_padded_way(name):
    ids, mask = batch(3, 12, (12, 9, 5))
    model = model_of(name, attention="classic")
    square = mask.unsqueeze(1) * mask.unsqueeze(2)
    holes = mask.clone()
    holes[:, 4] = 0
    with torch.no_grad():
        for seen in (square, holes):
            full, some = model(ids, seen), model(ids, seen, positions={})
            assert close(full.logits["celltype"], some.logits["celltype"])
            assert some.last_hidden_state[1, -1].any()
        weights = model(ids, mask, positions={}, output_attentions=True).attentions
    assert len(weights) == 3 and weights[0].shape[0] == 3


def test_what_a_packing_holds():
    mask = torch.zeros(4, 6, dtype=torch.int64)
    for row, length in enumerate((2, 6, 0, 2)):
        mask[row, :length] = 1
    kept, packing = Packing.of(mask)
    assert kept is mask and packing.rows == [1, 0, 3] and packing.lengths == [6, 2, 2]
    assert packing.offsets.tolist() == [0, 6, 8, 10] and packing.offsets.dtype == torch.int32
    assert packing.index.tolist() == [6, 7, 8, 9, 10, 11, 0, 1, 18, 19]
    assert packing.places.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 0, 1]
    assert packing.groups == [(6, 0, [1]), (2, 6, [0, 3])]
    assert torch.equal(packing.valid, mask.bool())
    states = torch.randn(4, 6, 3)
    assert torch.equal(packing.unpack(packing.pack(states)), states * mask.unsqueeze(-1))
    wider, gathered = packing.longer(1)
    assert gathered.tolist() == [0, 1, 2, 3, 4, 5, 11, 6, 7, 10, 8, 9, 13] and wider.lengths == [7, 3, 3]
    assert wider.offsets.tolist() == [0, 7, 10, 13] and wider.length == 7
    assert packing.to("cpu", non_blocking=True).lengths == packing.lengths


def test_a_batch_without_padding_is_left_alone():
    full = torch.ones(3, 5, dtype=torch.int64)
    assert Packing.of(full) == (None, None) and Packing.of(None) == (None, None)
    square = full.unsqueeze(1) * full.unsqueeze(2)
    assert Packing.of(square) == (square, None)
    nothing = torch.zeros(2, 5)
    assert Packing.of(nothing) == (nothing, None)


@pytest.mark.parametrize("window", [None, 2])
def test_kernels_for_cells_of_any_length_get_the_stream_and_its_offsets(window, monkeypatch):
    """The kernel runs on a GPU only; here its place is taken by plain attention between the offsets."""
    from bmfm_pipeline.models import attention

    def between_offsets(query, key, value, starts, other_starts, longest, other_longest, *, window_size):
        assert starts is other_starts and longest == other_longest == max(LENGTHS) and query.shape == (36, 2, 8)
        mixed = []
        for start, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
            q, k, v = (part[start:end].transpose(0, 1) for part in (query, key, value))
            places = torch.arange(end - start)
            far = (places[:, None] - places).abs() > window_size[0] if window_size != (-1, -1) else None
            scores = q @ k.transpose(-1, -2) / 8**0.5
            scores = scores if far is None else scores.masked_fill(far, -torch.inf)
            mixed.append((scores.softmax(-1) @ v).transpose(0, 1))
        return torch.cat(mixed)

    monkeypatch.setattr(attention, "_varlen", lambda: between_offsets)
    _, mask = batch(5, 12, LENGTHS)
    _, packing = Packing.of(mask)
    padded = [torch.randn(5, 2, 12, 8, requires_grad=True) for _ in range(3)]
    stream = [packing.pack(part.transpose(1, 2)).transpose(1, 2) for part in padded]
    allowed = visibility(attention_allowed(mask), torch.zeros(5, 12, 16), "torch", 0.0, window)
    wanted, _ = attend(*padded, allowed, 0.0, "torch")
    wanted = packing.pack(wanted.transpose(1, 2)).transpose(1, 2)
    by_offsets = _attend_varying(*stream, packing, window)
    by_length, _ = attend(*stream, PackedCells(packing, window), 0.0, "torch")
    seen = PackedCells(packing, window).padded(mask.device, "torch", 0.0)
    in_cells = packing.in_cells(lambda *parts: attend(*parts, seen, 0.0, "torch")[0], *stream)
    for got in (by_offsets, by_length, in_cells):
        assert got.shape == (1, 2, 36, 8) and close(got, wanted)
        gradients = [torch.autograd.grad(x.square().sum(), padded, retain_graph=True) for x in (got, wanted)]
        assert all(close(a, b) for a, b in zip(*gradients, strict=True))


def test_whole_cell_and_gene_query_heads_score_what_is_read_only():
    model = model_of("scbert")
    ids, mask = batch(5, 12, LENGTHS)
    heads, seen = model.cls.predictions.predictions, {}
    for name in ("expressions_wced", "expressions_mvc_regression", "genes_token_scores", "expressions_regression"):
        heads.head(name).register_forward_hook(
            lambda _, given, __, name=name: seen.update({name: given[0].shape[:-1].numel()})
        )
    model(ids, mask, positions={"genes": torch.tensor([1, 14]), "expressions": torch.tensor([2, 3, 30])})
    assert seen == {
        "expressions_wced": 5,
        "expressions_mvc_regression": 3,
        "genes_token_scores": 2,
        "expressions_regression": 3,
    }


@pytest.mark.parametrize("name", NAMES)
def test_what_only_the_first_position_is_read_of_is_the_same_when_no_other_is_computed(name, monkeypatch):
    further = model_of(name)  # a label is decoded from another position
    labels = [entry for entry in backbone_cases.LABELS if "decode_from" not in entry]
    monkeypatch.setattr(backbone_cases, "LABELS", labels)
    model = model_of(name)
    ids, mask = batch(5, 12, LENGTHS)
    pairwise = mask.unsqueeze(1) * mask.unsqueeze(2)
    ways = [(ids, mask), (ids, None), (ids[:1], mask[:1])]
    ways += [(ids, pairwise)] if name == "scbert" else []
    with torch.no_grad():
        for given, seen in ways:
            whole, first = (model(given, seen, positions={}, first_only=only) for only in (False, True))
            for key, scores in whole.logits.items():
                torch.testing.assert_close(first.logits[key], scores, atol=1e-6, rtol=1e-5)
            torch.testing.assert_close(first.embeddings, whole.embeddings, atol=1e-6, rtol=1e-5)
            torch.testing.assert_close(
                first.last_hidden_state[:, 0], whole.last_hidden_state[:, 0], atol=1e-6, rtol=1e-5
            )
            short = name == "scbert" and (seen is None or seen.dim() == 2)
            assert first.last_hidden_state.shape[1] == (1 if short else 12)
        asked = model(ids, mask, positions=everywhere(mask), first_only=True)
        assert asked.last_hidden_state.shape[1] == 12  # masked fields are read at other positions
        assert further(ids, mask, positions={}, first_only=True).last_hidden_state.shape[1] == 12
        asked = model(ids, mask, positions={}, first_only=True, output_hidden_states=True)
        assert all(states.shape[1] == 12 for states in asked.hidden_states)


def test_the_last_layer_computes_first_positions_alone(monkeypatch):
    monkeypatch.setattr(backbone_cases, "LABELS", backbone_cases.LABELS[:1])
    model = model_of("scbert")
    ids, mask = batch(5, 12, LENGTHS)
    rows: dict[int, list[int]] = {}

    def count(number: int):
        def hook(module, given) -> None:
            rows.setdefault(number, []).append(given[0].shape[:-1].numel())

        return hook

    layers = model.backbone.encoder.layer
    for number in (0, len(layers) - 1):
        for part in (
            layers[number].attention.self.query,
            layers[number].attention.self.key,
            layers[number].intermediate.dense,
        ):
            part.register_forward_pre_hook(count(number))
    with torch.no_grad():
        model(ids, mask, positions={}, first_only=True)
    assert rows == {0: [sum(LENGTHS)] * 3, len(layers) - 1: [len(LENGTHS), sum(LENGTHS), len(LENGTHS)]}
