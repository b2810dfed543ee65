"""Integrated gradients: sums are the change of the score for every network and field, and known markers come first."""

import numpy as np
import pytest
import torch
from backbone_cases import FIELDS, NAMES, SIZES, VOCABULARY, batch, model_of

from bmfm_pipeline.errors import ConfigError
from bmfm_pipeline.evaluation.attributions import integrate
from bmfm_pipeline.evaluation.attributions.paths import Baseline, LabelScores, naming_row, plain_gradients
from bmfm_pipeline.models import build_model
from bmfm_pipeline.models.expressed import GeneScores

pytest.importorskip("captum", reason="captum is not installed: pip install 'bmfm-pipeline[interpret]'")
COLUMNS = ["tissue", "organ", "donor", "age"]
PAD = Baseline("pad", (1, 2, 3), 2, {})
GENES = {"field_name": "genes", "vocab_size": VOCABULARY, "num_special_tokens": 5}
TOKENS = {"field_name": "expressions", "vocab_size": 15, "num_special_tokens": 5}
CHUNKS = {"field_name": "dna_chunks", "vocab_size": VOCABULARY, "num_special_tokens": 5}
BOTH_WAYS = {"cell_summary": True, "linear_path": True}


def network(name, labels=COLUMNS, **changes):
    """(model, the linear paths of which have learned something, attributor)."""
    model = model_of(name, **changes)
    for module in model.modules():
        if isinstance(module, GeneScores):
            module.sizes.uniform_(0, 0.01)
    return model, integrate.Attributor(model, labels, PAD)


def all_targets(attributor, cells: int) -> torch.Tensor:
    return torch.arange(sum(label.output_size for label in attributor.scores.labels)).expand(cells, -1)


def logits(model, labels, ids, mask) -> np.ndarray:
    with torch.no_grad():
        found = model(ids, mask, positions={}).logits
    return torch.cat([found[name] for name in labels], dim=1).numpy()


def check_complete(model, attributor, labels, ids, mask):
    found = attributor(ids, mask, all_targets(attributor, len(ids)))
    start = PAD.of(ids, model.config.input_fields)
    np.testing.assert_allclose(found.end, logits(model, labels, ids, mask), atol=1e-5)
    np.testing.assert_allclose(found.start, logits(model, labels, start, mask), atol=1e-5)
    change = np.abs(found.end - found.start).max(axis=1, keepdims=True)
    assert (np.abs(found.scores.sum(axis=2) - (found.end - found.start)) <= 0.01 * change).all()
    np.testing.assert_allclose(found.paths.sum(axis=2), found.scores.sum(axis=2), atol=1e-5)
    genes = (PAD.genes(ids, model.config.input_fields) & (mask > 0)).numpy()
    assert not found.scores[~np.broadcast_to(genes[:, None], found.scores.shape)].any()
    return found


class TestCompleteness:
    @pytest.mark.parametrize("changes", [{"classifier_pooling": "mean"}, BOTH_WAYS], ids=["mean", "paths"])
    @pytest.mark.parametrize("name", NAMES)
    def test_sums_are_the_change_of_the_score_also_of_heads_that_are_to_be_unlearned(self, name, changes):
        model, attributor = network(name, **changes)
        found = check_complete(model, attributor, COLUMNS, *batch(3))
        if changes == BOTH_WAYS:
            assert (np.abs(found.paths[:, :4]).max(axis=(0, 1)) > 1e-3).all(), "every way has its part"

    @pytest.mark.parametrize("name", NAMES)
    def test_where_the_first_position_alone_is_computed_in_the_last_layer(self, name):
        model, attributor = network(name, ["celltype"], **BOTH_WAYS)
        check_complete(model, attributor, ["celltype"], *batch(3))

    @pytest.mark.parametrize("fields", [[GENES, TOKENS], [CHUNKS]], ids=["tokens", "dna"])
    def test_fields_of_tokens_and_a_single_one(self, fields):
        torch.manual_seed(3)
        label = [{"label_column_name": "celltype", "n_unique_values": 3}]
        model = build_model({"model_type": "scbert", **SIZES}, fields, label).eval()
        ids, mask = batch()
        ids = ids[:, : len(fields)].long().clamp(min=0)
        special = (ids[:, 0] < 5) & (mask > 0)
        ids = torch.where((ids[:, :1] == 2) | special[:, None], ids[:, :1], ids)  # special tokens in all fields
        if len(fields) > 1:
            ids[:, 1] = torch.where(ids[:, 0] < 5, ids[:, 0], ids[:, 1] + 5)
        attributor = integrate.Attributor(model, ["celltype"], PAD)
        check_complete(model, attributor, ["celltype"], ids, mask)
        assert naming_row(model.config.input_fields) == 0

    def test_it_is_the_integral_that_a_plain_sum_of_many_steps_gives(self):
        model, attributor = network("scbert", ["celltype"])
        ids, mask = batch(2)
        found = attributor(ids, mask, torch.tensor([[0, 4]] * 2)).scores
        scores = LabelScores(model, ["celltype"])
        ends = scores.ends(ids, mask, PAD)
        (last,), (first,), steps = ends.inputs, ends.baselines, 100
        total, targets = torch.zeros(2, 2, ids.shape[2]), torch.tensor([[0, 4]] * 2)
        with plain_gradients(model):
            for number in range(steps):
                point = (first + (number + 0.5) / steps * (last - first)).requires_grad_()
                values = scores.between(point, *ends.extras(targets))
                for kind in range(2):
                    (slope,) = torch.autograd.grad(values[:, kind].sum(), point, retain_graph=True)
                    total[:, kind] += (slope * (last - first)).sum(-1) / steps
        np.testing.assert_allclose(found, total.numpy() * (mask > 0)[:, None].numpy(), atol=1e-4)


class TestSteps:
    def test_a_cell_is_attributed_alike_whatever_is_beside_it_and_however_much_is_computed_at_once(self):
        _, attributor = network("scllama", ["celltype"], **BOTH_WAYS)
        ids, mask = batch()
        whole = attributor(ids, mask, all_targets(attributor, 4))
        again = attributor(ids, mask, all_targets(attributor, 4))
        assert np.array_equal(whole.scores, again.scores)
        for at_once in (1, 5, 100):
            attributor.at_once = at_once
            alone = attributor(ids[2:3, :, :10], mask[2:3, :10], all_targets(attributor, 1))
            np.testing.assert_allclose(alone.scores[0], whole.scores[2, :, :10], atol=2e-4)

    def test_steps_are_doubled_for_the_cells_that_need_it_and_a_number_that_is_given_stays(self, monkeypatch):
        _, attributor = network("scbert", ["celltype"])
        targets = all_targets(attributor, 4)
        monkeypatch.setattr(integrate, "FEWEST_STEPS", 1)
        monkeypatch.setattr(integrate, "TOLERANCE", 2e-4)
        found = attributor(*batch(), targets)
        assert found.steps.max() > 1 and (found.error <= 2e-4).all()
        attributor.n_steps = 1
        fixed = attributor(*batch(), targets)
        assert set(fixed.steps) == {1} and fixed.error.max() > found.error.max()

    def test_points_that_do_not_fit_into_memory_are_halved(self, monkeypatch):
        _, attributor = network("scbert", ["celltype"])
        ids, mask = batch()
        expected = attributor(ids, mask, all_targets(attributor, 4)).scores
        plain = attributor._captum.gradient_func

        def small(forward_fn, inputs, **rest):
            if len(inputs[0]) > 6:
                raise RuntimeError("CUDA out of memory")
            return plain(forward_fn, inputs, **rest)

        attributor._captum.gradient_func = small
        np.testing.assert_allclose(attributor(ids, mask, all_targets(attributor, 4)).scores, expected, atol=1e-6)
        assert attributor.at_once == 4

    def test_the_model_is_left_as_it_was(self):
        model, attributor = network("scbert")
        before = [parameter.requires_grad for parameter in model.parameters()]
        attributor(*batch(1), all_targets(attributor, 1))
        assert before == [parameter.requires_grad for parameter in model.parameters()] and any(before)
        assert model.cls.label_predictions.predictions.label_decoders["donor"].decoder[0].coefficient == 0.5


class TestBaselines:
    def test_pad_replaces_all_but_special_tokens_in_every_field(self):
        ids, _ = batch(2, 5, lengths=(5, 3))
        ids[0, :, 4] = torch.tensor([1.0, -2.0])
        found = PAD.of(ids, model_of("scbert").config.input_fields)
        assert found[0].tolist() == [[3, 2, 2, 2, 1], [-4, -3, -3, -3, -2]]
        assert found[1].tolist() == [[3, 2, 2, 2, 2], [-4, -3, -3, -3, -3]]

    def test_zero_keeps_genes_and_says_nothing_of_a_value_that_is_zero_already(self):
        model = model_of("scbert", **BOTH_WAYS)
        ids, mask = batch()
        ids[:, 1, 2] = 0.0
        zero = Baseline("zero", (1, 2, 3), 2, {})
        assert torch.equal(zero.of(ids, model.config.input_fields)[:, 0], ids[:, 0])
        attributor = integrate.Attributor(model, ["celltype"], zero)
        found = attributor(ids, mask, all_targets(attributor, 4))
        assert np.abs(found.scores[:, :, 2]).max() < 1e-6 < np.abs(found.scores[:, :, 1]).min()
        assert found.error.max() < 0.01

    def test_zero_of_tokens_is_the_token_of_zero(self):
        fields = build_model({"model_type": "scbert", **SIZES}, [GENES, TOKENS], []).config.input_fields
        ids = torch.tensor([[[3, 9, 1], [3, 12, 1]]])
        assert Baseline("zero", (1, 2, 3), 2, {"expressions": 5}).of(ids, fields)[0, 1].tolist() == [3, 5, 1]
        with pytest.raises(ConfigError, match=r"task\.baseline: zero.*expressions.*no value 0"):
            Baseline("zero", (1, 2, 3), 2, {}).of(ids, fields)


WITHOUT_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
MARKERS = {0: (10, 11), 1: (20, 21), 2: (30, 31), 3: ()}
OTHERS = torch.tensor([gene for gene in range(5, VOCABULARY) if gene not in (10, 11, 20, 21, 30, 31)])


def cells_with_markers(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """[CLS], ten genes and [SEP]: the two markers of the class among genes that all classes have; the last class has no marker."""
    kinds = torch.randint(4, (count,), generator=generator)
    genes = OTHERS[torch.rand(count, len(OTHERS), generator=generator).argsort(dim=1)[:, :10]]
    for kind in range(3):
        genes[kinds == kind, :2] = torch.tensor(MARKERS[kind])
    genes = genes.gather(1, torch.rand(count, 10, generator=generator).argsort(dim=1))
    edge = torch.ones(count, 1, dtype=torch.int64)
    genes = torch.cat([3 * edge, genes, edge], dim=1).float()
    values = 1 + 3 * torch.rand(count, 12, generator=generator)
    values[:, 0], values[:, -1] = -4, -2
    return torch.stack([genes, values], dim=1), kinds


@pytest.fixture(scope="module")
def learned():
    """A network that tells three classes of cells by two marker genes each, and a fourth by their absence."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    label = [{"label_column_name": "celltype", "n_unique_values": 4}]
    fields = [GENES, {**FIELDS[1], "decode_modes": {}}]
    options = {**sizes, **WITHOUT_DROPOUT, "initializer_range": 0.1}
    model = build_model({"model_type": "scbert", **options}, fields, label)
    generator, optimiser = torch.Generator().manual_seed(1), torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(150):
        ids, kinds = cells_with_markers(64, generator)
        loss = torch.nn.functional.cross_entropy(model(ids, positions={}).logits["celltype"], kinds)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.05
    return model.eval()


def test_the_genes_that_decide_a_class_come_first(learned):
    ids, kinds = cells_with_markers(24, torch.Generator().manual_seed(2))
    attributor = integrate.Attributor(learned, ["celltype"], PAD)
    found = attributor(ids, torch.ones(24, 12, dtype=torch.int64), kinds[:, None])
    assert found.error.max() < 0.01
    for row, kind in enumerate(kinds.tolist()):
        first = ids[row, 0][np.argsort(-found.scores[row, 0])[:2].tolist()].tolist()
        assert kind == 3 or sorted(first) == list(MARKERS[kind])


def test_shuffled_weights_give_other_attributions(learned):
    from bmfm_pipeline.evaluation.attributions.checks import check_attributions, shuffled

    ids, _ = cells_with_markers(16, torch.Generator().manual_seed(4))
    names = [f"cell{row}" for row in range(16)]
    loader = [{"input_ids": ids, "attention_mask": torch.ones(16, 12, dtype=torch.int64), "cell_name": names}]
    found = check_attributions(integrate.Attributor(learned, ["celltype"], PAD), loader, seed=5, sanity=True)
    assert found["steps"]["rank_correlation"] > 0.95 and found["cells"] == 16
    assert set(found["sanity"]) == {"head", "model", "another_class"}
    assert found["sanity"]["model"]["mean"] < 0.5
    same = learned.state_dict()
    head = shuffled(learned, "head", 5).state_dict()
    changed = [name for name in same if not torch.equal(same[name], head[name])]
    assert changed and all("label_decoders" in name for name in changed)


def test_what_to_install_where_captum_is_missing(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'bmfm-pipeline\[interpret\]'"):
        integrate.require_captum()
