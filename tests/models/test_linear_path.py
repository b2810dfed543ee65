"""Sums over genes weighted by their value: the summary that position 0 is given, and the linear path beside the encoder."""

import pytest
import torch

from bmfm_pipeline.errors import ConfigError
from bmfm_pipeline.models import build_model, load_model
from bmfm_pipeline.models.expressed import GeneScores
from bmfm_pipeline.models.packing import Packing
from bmfm_pipeline.objectives import build_objectives

GENES = {"field_name": "genes", "vocab_size": 40, "num_special_tokens": 5}
NUMBERS = {"field_name": "expressions", "tokenization_strategy": "continuous_value_encoder", "num_special_tokens": 5}
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
LABELS = [{"label_column_name": "celltype", "n_unique_values": 3}]


def small(fields=(GENES, NUMBERS), labels=LABELS, model_type="scbert", **options):
    torch.manual_seed(0)
    return build_model({"model_type": model_type, **SIZES, **options}, fields, labels).eval()


def two_cells() -> tuple[torch.Tensor, torch.Tensor]:
    """[CLS] gene gene gene [SEP] and [CLS] gene [SEP] pad pad, special tokens as -(id + 1) among the values."""
    genes = torch.tensor([[3, 10, 11, 12, 1], [3, 11, 1, 2, 2]])
    values = torch.tensor([[-4.0, 3.0, 0.0, 4.0, -2.0], [-4.0, 7.0, -2.0, -3.0, -3.0]])
    return torch.stack([genes.float(), values], dim=1), torch.tensor([[1] * 5, [1, 1, 1, 0, 0]])


def learned(model) -> GeneScores:
    path = next(module for module in model.modules() if isinstance(module, GeneScores))
    torch.nn.init.normal_(path.weight)
    return path


def test_the_linear_path_is_the_sum_of_values_of_length_one_times_size_and_weight():
    path = learned(small(linear_path=True))
    path.sizes.uniform_()
    ids, _ = two_cells()
    by_hand = path.sizes[[10, 12]].unsqueeze(1) * path.weight[[10, 12]] * torch.tensor([[0.6], [0.8]])
    expected = torch.stack([by_hand.sum(0), path.sizes[11] * path.weight[11]]) * GeneScores.SCALE
    torch.testing.assert_close(path(ids), expected)


def test_scores_are_the_mean_of_two_paths_that_each_learn_by_themselves():
    model = small(linear_path=True)
    path, (ids, mask) = learned(model), two_cells()
    labels = {"celltype": torch.tensor([0, 2])}
    objectives = build_objectives(
        [{"label_column_name": "celltype", "name": "cross_entropy"}], [GENES, NUMBERS], LABELS
    )
    for part in model.modules():
        if hasattr(part, "p"):
            part.p = 0.0
    logits = model.train()(ids, mask, positions={}).logits
    encoder, linear = logits["celltype%paths"]
    torch.testing.assert_close(logits["celltype"], (encoder + linear) / 2)
    loss = objectives.compute(logits, labels).total
    alone = [torch.nn.functional.cross_entropy(part, labels["celltype"]) for part in (encoder, linear)]
    torch.testing.assert_close(loss, sum(alone) / 2)
    (of_both,) = torch.autograd.grad(loss, path.weight, retain_graph=True)
    (of_one,) = torch.autograd.grad(alone[1] / 2, path.weight)
    torch.testing.assert_close(of_both, of_one)
    assert list(model.eval()(ids, mask, positions={}).logits) == ["celltype"]


def test_sizes_are_root_mean_squares_among_the_cells_that_are_shown():
    path = next(module for module in small(linear_path=True).modules() if isinstance(module, GeneScores))
    ids, _ = two_cells()
    path.measure([ids[:1], ids[1:]])
    expected = torch.zeros(40)
    expected[[10, 11, 12]] = torch.tensor([0.6**2, 1.0, 0.8**2]).div(2).sqrt()
    torch.testing.assert_close(path.sizes, expected)
    assert path.is_fresh


@pytest.mark.parametrize("model_type", ["scbert", "scmodernbert", "scperformer", "scnystromformer", "scllama"])
def test_packed_cells_get_the_same_summary_and_scores_as_padded_ones(model_type):
    model = small(model_type=model_type, linear_path=True, cell_summary=True)
    learned(model)
    ids, mask = two_cells()
    assert Packing.of(mask)[1] is not None
    with torch.no_grad():
        padded = model(ids, mask).logits["celltype"]
        packed = model(ids, mask, positions={}).logits["celltype"]
        alone = model(ids[1:, :, :3], mask[1:, :3], positions={}).logits["celltype"]
    torch.testing.assert_close(packed, padded, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(packed[1:], alone, atol=1e-5, rtol=1e-4)


def test_the_summary_moves_position_0_by_the_normed_sum_of_gene_vectors():
    model = small(cell_summary=True)
    embeddings, (ids, _) = model.backbone.embeddings, two_cells()
    vectors = embeddings.embed_field("genes", ids[:, 0])
    total = vectors + embeddings.embed_field("expressions", ids[:, 1])
    summary = (0.6 * vectors[0, 1] + 0.8 * vectors[0, 3]).detach()
    total[0, 0] += torch.nn.functional.layer_norm(summary, (16,), eps=1e-12)
    torch.testing.assert_close(embeddings(ids)[0], embeddings.LayerNorm(total)[0], atol=1e-5, rtol=1e-4)


def test_a_saved_model_scores_alike_and_an_unchanged_one_has_no_new_tensors(tmp_path):
    model = small(linear_path=True, cell_summary=True)
    learned(model).sizes.uniform_()
    model.save_pretrained(tmp_path)
    ids, mask = two_cells()
    with torch.no_grad():
        again = load_model(tmp_path)(ids, mask, positions={}).logits["celltype"]
        assert torch.equal(again, model(ids, mask, positions={}).logits["celltype"])
    assert not [name for name in small().state_dict() if "linear_path" in name or "cell_summary" in name]


@pytest.mark.parametrize("key", ["linear_path", "cell_summary"])
def test_tokens_are_no_numbers_to_sum_with(key):
    tokens = {"field_name": "expressions", "vocab_size": 15, "num_special_tokens": 5}
    with pytest.raises(ConfigError, match=rf"model.{key}.*continuous"):
        small([GENES, tokens], **{key: True})


def test_what_the_encoder_is_to_unlearn_has_no_path_beside_it():
    donor = {"label_column_name": "donor", "n_unique_values": 2, "gradient_reversal_coefficient": 0.1}
    heads = small(labels=[*LABELS, donor], linear_path=True).cls.label_predictions.predictions.label_decoders
    assert heads["celltype"].linear_path is not None and heads["donor"].linear_path is None


def test_without_tokens_there_is_nothing_to_sum():
    with pytest.raises(ValueError, match="linear_path"):
        small(linear_path=True)(inputs_embeds=torch.zeros(1, 4, 16))
