"""Random features and landmarks: what they approximate, what they keep, what they redraw."""

import itertools

import pytest
import torch
from backbone_cases import FIELDS, LABELS, OWN, SIZES, batch, model_of, scores_of_row
from safetensors.torch import load_file

from bmfm_pipeline.errors import CheckpointError, ConfigError
from bmfm_pipeline.models import SCNystromformerConfig, SCPerformerConfig, build_model, load_model, load_weights
from bmfm_pipeline.models.nystrom_attention import NystromAttention, place_landmarks, pseudo_inverse, slide
from bmfm_pipeline.models.random_features import RandomFeatureAttention, draw_features


def attention(kind, config):
    """A self-attention of its own whose output projection, where it has one, changes nothing."""
    torch.manual_seed(0)
    module = kind(config).eval()
    with torch.no_grad():
        if kind is RandomFeatureAttention:
            module.projection_matrix.copy_(module.draw(0))
            module.out.weight.copy_(torch.eye(len(module.out.weight)))
            module.out.bias.zero_()
        else:
            module.conv.weight.zero_()
    return module


def exact(module, hidden, valid):
    mixed = torch.nn.functional.scaled_dot_product_attention(*module.project(hidden), attn_mask=valid[:, None, None, :])
    return mixed.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("algorithm", ["qr", "gaussian"])
def test_features_are_directions_of_the_right_length(algorithm):
    drawn = draw_features(40, 16, algorithm, True, torch.Generator().manual_seed(1))
    assert drawn.shape == (40, 16) and torch.allclose(drawn.norm(dim=1), torch.tensor(4.0), atol=1e-5)
    products = drawn[:16] @ drawn[:16].T / 16
    right_angles = torch.allclose(products, torch.eye(16), atol=1e-5)
    assert right_angles == (algorithm == "qr")
    free = draw_features(4000, 16, algorithm, False, torch.Generator().manual_seed(1))
    assert free.norm(dim=1).std() > 0.5 and free.std().item() == pytest.approx(1.0, abs=0.03)


@pytest.mark.parametrize("kernel", ["exp", "cosh"])
def test_many_random_features_come_close_to_softmax(kernel):
    errors = []
    for features in (16, 4096):
        config = SCPerformerConfig(
            hidden_size=32, num_attention_heads=2, kernel_type=kernel, num_random_features=features, feature_seed=3
        )
        config.kernel_epsilon, config.regularize_feature_norms = 1e-6, False  # without bias
        module = attention(RandomFeatureAttention, config)
        with torch.no_grad():
            hidden = torch.randn(2, 50, 32, generator=torch.Generator().manual_seed(5))
            valid = torch.ones(2, 50, dtype=torch.bool)
            valid[1, 30:] = False
            got, wanted = module(hidden, valid)[0], exact(module, hidden, valid)
            errors.append(((got - wanted)[valid].norm() / wanted[valid].norm()).item())
    assert errors[1] < 0.08 and errors[1] < errors[0] / 4


def test_the_number_of_features_follows_from_the_width_of_a_head():
    assert SCPerformerConfig(hidden_size=32, num_attention_heads=2).features == 44  # 16 ln 16
    assert SCPerformerConfig(hidden_size=32, num_attention_heads=2, num_random_features=7).features == 7


def test_features_are_weights_drawn_from_a_seed_that_is_kept(tmp_path):
    first, second, third = model_of("scperformer", 1), model_of("scperformer", 1), model_of("scperformer", 2)
    key = "scperformer.encoder.layer.1.attention.self.projection_matrix"
    assert torch.equal(first.state_dict()[key], second.state_dict()[key])
    assert first.config.feature_seed == second.config.feature_seed != third.config.feature_seed
    assert not torch.equal(first.state_dict()[key], first.state_dict()[key.replace("layer.1", "layer.0")])
    assert torch.equal(
        model_of("scperformer", 5, feature_seed=7).state_dict()[key],
        model_of("scperformer", 6, feature_seed=7).state_dict()[key],
    )
    first.save_pretrained(tmp_path)
    assert torch.equal(load_file(tmp_path / "model.safetensors")[key], first.state_dict()[key])
    assert load_model(tmp_path).config.feature_seed == first.config.feature_seed
    ids, mask = batch()
    with torch.no_grad():  # the size of a batch redraws nothing
        before = first(ids, mask).logits["celltype"]
        first(ids[:1], mask[:1])
        assert torch.equal(before, first(ids, mask).logits["celltype"])


def test_features_are_redrawn_in_training_only_as_asked_and_alike_after_a_break():
    key = "scperformer.encoder.layer.0.attention.self.projection_matrix"
    ids, mask = batch()

    def after(model, passes):
        seen = []
        for _ in range(passes):
            model(ids, mask).logits["celltype"].sum().backward()
            seen.append(model.state_dict()[key].clone())
        return seen

    whole = after(model_of("scperformer", feature_redraw_interval=2).train(), 7)
    assert [torch.equal(a, b) for a, b in itertools.pairwise(whole)] == [
        True,
        False,
        True,
        False,
        True,
        False,
    ]
    stopped = model_of("scperformer", feature_redraw_interval=2).train()
    after(stopped, 3)
    resumed = model_of("scperformer", 9, feature_redraw_interval=2, feature_seed=stopped.config.feature_seed).train()
    after(resumed, 1)
    resumed.load_state_dict(stopped.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(whole[3:], after(resumed, 4), strict=True))
    still = model_of("scperformer", feature_redraw_interval=2)
    assert torch.equal(after(still, 5)[-1], whole[0])  # not in evaluation
    saving = model_of("scperformer", feature_redraw_interval=2).train()
    saving.gradient_checkpointing_enable()
    assert torch.equal(after(saving, 4)[-1], whole[3])  # passes are counted once


def test_published_weights_without_features_are_noted_and_half_of_them_is_an_error():
    source, model = model_of("scperformer", 1), model_of("scperformer", 2)
    given = source.state_dict()
    own = model.state_dict()["scperformer.encoder.layer.0.attention.self.projection_matrix"].clone()
    without = {key: value for key, value in given.items() if not key.endswith("projection_matrix")}
    report = load_weights(model, without)
    assert report.clean and "random features are not among these weights" in report.notes[0]
    assert torch.equal(model.backbone.attentions()[0].projection_matrix, own)
    del given["scperformer.encoder.layer.0.attention.self.projection_matrix"]
    with pytest.raises(CheckpointError, match=r"missing from the checkpoint \(1\)"):
        load_weights(model, given)


@pytest.mark.parametrize("name", ["scperformer", "scnystromformer"])
def test_the_published_arithmetic_lets_padding_in_and_is_off_by_default(name):
    ids, mask = batch(3, 16, (16, 9, 9))
    longer, wider = torch.nn.functional.pad(ids, (0, 16), value=2.0), torch.nn.functional.pad(mask, (0, 16))
    longer[:, 1, 16:] = -3.0
    changes = []
    for legacy in ({}, {"legacy_attention": True}):
        model = model_of(name, **legacy)
        assert model.config.legacy_attention == bool(legacy)
        with torch.no_grad():
            short, long = model(ids, mask), model(longer, wider)
        one, other = scores_of_row(short, 1, 9), scores_of_row(long, 1, 9)
        changes.append(max((one[key] - other[key]).abs().max().item() for key in one))
    assert changes[0] < 1e-5 and changes[1] > 1e-3


def test_without_padding_both_arithmetics_of_landmarks_agree():
    ids, mask = batch(1, 16, (16,))
    with torch.no_grad():
        # One cell and one head, so that a start shared by the batch is its own.
        options = {"num_landmarks": 4, "num_attention_heads": 1}
        ours, theirs = (
            model_of("scnystromformer", **options),
            model_of("scnystromformer", legacy_attention=True, **options),
        )
        for key, value in ours(ids, mask).logits.items():
            assert torch.allclose(value, theirs(ids, mask).logits[key], atol=1e-4), key
    with pytest.raises(ConfigError, match=r"11 tokens long, which is not a multiple of model\.num_landmarks 4"):
        theirs(ids[:, :, :11], mask[:, :11])


@pytest.mark.parametrize(("method", "iterations"), [("original", 12), ("newton", 30), ("chebyshev", 20)])
def test_the_iteration_inverts(method, iterations):
    matrix = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0)).double()
    matrix = torch.softmax(matrix + 3 * torch.eye(6), dim=-1)
    inverse = pseudo_inverse(matrix, method, iterations)
    assert torch.allclose(matrix @ inverse, torch.eye(6).double().expand_as(matrix), atol=1e-6)
    alone = pseudo_inverse(matrix[:1, 1:2], method, iterations)
    assert torch.allclose(alone, inverse[:1, 1:2], atol=1e-12)


def test_landmarks_share_out_what_is_not_padding():
    config = SCNystromformerConfig(hidden_size=32, num_attention_heads=2, num_landmarks=4)
    valid = torch.zeros(4, 11, dtype=torch.bool)
    for row, length in enumerate((11, 4, 0, 6)):
        valid[row, :length] = True
    marks = place_landmarks(torch.zeros(4, 11, 32), valid, config)
    assert marks.exact.tolist() == [1, 2] and marks.rows.tolist() == [0, 3]
    assert torch.allclose(marks.weights.sum(-1), torch.ones(2, 4))
    assert ((marks.weights > 0).sum(1) == valid[[0, 3]]).all()  # every position is in one landmark
    sizes = (marks.weights > 0).sum(-1)
    assert sizes.tolist() == [[3, 3, 3, 2], [2, 1, 2, 1]]


def test_landmarks_come_close_to_softmax_and_few_tokens_get_all_of_it():
    errors = []
    hidden = torch.randn(2, 60, 32, generator=torch.Generator().manual_seed(5)).cumsum(1) / 8  # neighbours are alike
    valid = torch.ones(2, 60, dtype=torch.bool)
    valid[1, 40:] = False
    for landmarks in (2, 20, 60):
        config = SCNystromformerConfig(
            hidden_size=32, num_attention_heads=2, num_landmarks=landmarks, inverse_n_iter=12
        )
        module = attention(NystromAttention, config)
        with torch.no_grad():
            got = module(hidden, place_landmarks(hidden, valid, config))[0]
            wanted = exact(module, hidden, valid)
        errors.append(((got - wanted)[valid].norm() / wanted[valid].norm()).item())
    assert errors[1] < errors[0] and errors[1] < 0.1 and errors[2] < 1e-5


@pytest.mark.parametrize("length", [1, 31, 32, 33, 100])
@pytest.mark.parametrize("width", [1, 5, 65])
def test_the_banded_product_is_the_convolution(length, width):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2, 3, length, 4, generator=generator, dtype=torch.float64).requires_grad_()
    weights = torch.randn(3, width, generator=generator, dtype=torch.float64).requires_grad_()
    wanted = torch.nn.functional.conv2d(values, weights[:, None, :, None], padding=(width // 2, 0), groups=3)
    got = slide(values, weights)
    assert torch.allclose(got, wanted, atol=1e-10)
    pulls = [torch.autograd.grad(one.square().sum(), (values, weights)) for one in (got, wanted)]
    assert all(torch.allclose(a, b, atol=1e-8) for a, b in zip(*pulls, strict=True))


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("scperformer", {"kernel_type": "softmax"}, "kernel_type is 'softmax'; there are 'exp', 'cosh', 'relu', 'elu'"),
        ("scperformer", {"feature_generation_algorithm": "kacs"}, "there are 'qr', 'gaussian'"),
        ("scperformer", {"num_random_features": 0}, "num_random_features is 0"),
        ("scnystromformer", {"inverse_method": "svd"}, "inverse_method is 'svd'"),
        ("scnystromformer", {"num_landmarks": 0}, "num_landmarks is 0"),
        ("scnystromformer", {"conv_kernel_size": 4}, "it is odd"),
    ],
)
def test_impossible_settings_are_refused(name, change, words):
    with pytest.raises(ConfigError, match=words):
        build_model({"model_type": name, **SIZES, **OWN.get(name, {}), **change}, FIELDS, LABELS)
