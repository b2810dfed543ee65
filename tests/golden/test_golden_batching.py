"""Batches against golden vectors of the compatible package: token ids and masks exactly, floats to 1e-5, masking rates in their errors.

Every case comes from the files themselves; none is skipped.
"""

import json
import re
from pathlib import Path

import numpy as np
import torch
from reference_cells import Cells, make_builder, read_tokens

from bmfm_pipeline.batching import BatchBuilder, BatchingConfig, FieldSpec, gene_mask_weights, kernels

COLLATOR_KEY = re.compile(
    r"input_ids__(?P<cells>raw|binned)(?P<kept>_unknown_genes_kept)?__(?P<kind>tok|cve)__"
    r"(?P<order>none|sorted|log_normalize|log_normalize_sorted)__(?:(?P<length>\d+)_(?P<padding>\w+)|max(?P<cut>\d+))$"
)
READ_DEPTH = re.compile(
    r"input_ids__(?P<cells>raw)__(?P<kind>cve)__rda_(?P<reads>\d+)(?:_mfi(?P<genes>\d+))?__max(?P<cut>\d+)$"
)
PREPENDED = re.compile(r"input_ids__prepend__tok__(?P<order>none|sorted)__(?P<length>\d+)_(?P<padding>\w+)$")


def prepended_ids(path: Path, tokens: list[str]) -> tuple[int, ...]:
    """The ids of [CLS_0], [CLS_1], [CLS_2]: those that the vectors for prepended tokens were made with."""
    assert "[CLS_0]" in tokens, path
    return tuple(tokens.index(f"[CLS_{number}]") for number in range(3))


def test_collator_vectors(golden_dir, data_dir, say):
    folder = golden_dir / "tokenization"
    cells = {name: Cells(json.loads((folder / f"cells_{name}.json").read_text())) for name in ("raw", "binned")}
    checked = 0
    for path in sorted(folder.glob("collator_*.npz")):
        identifier = path.stem.removeprefix("collator_")
        tokenizers = data_dir / "tokenizers" / identifier / "tokenizers"
        genes, expressions = read_tokens(tokenizers / "genes"), read_tokens(tokenizers / "expressions")
        stored = np.load(path)
        for key in stored.files:
            if not key.startswith("input_ids__"):
                continue
            settings, match = {}, COLLATOR_KEY.match(key)
            if match is None and (match := PREPENDED.match(key)):
                settings["prefix_ids"] = prepended_ids(path, genes)
            elif match is None and (match := READ_DEPTH.match(key)):
                # A vocabulary without [S] and [T] gave both the id of [UNK].
                ids = tuple(genes.index(token) if token in genes else 0 for token in ("[S]", "[T]"))
                settings |= {"rda_transform": int(match["reads"]), "depth_ids": ids}
                settings["max_mfi_data_len"] = int(match["genes"]) if match["genes"] else None
            assert match is not None, f"a kind of vector that this test does not know: {identifier}/{key}"
            case = match.groupdict()
            order = case.get("order") or "none"
            builder = make_builder(
                cells[case.get("cells") or "binned"],
                genes,
                expressions,
                tokenized=case.get("kind") != "cve",
                mlm=False,
                max_length=int(case.get("length") or case["cut"]),
                padding=case.get("padding") or "max_length",
                sequence_order="sorted" if order.endswith("sorted") else None,
                log_normalize_transform=order.startswith("log_normalize"),
                limit_genes=None if case.get("kept") else "tokenizer",
                **settings,
            )
            batch = builder.build(np.arange(builder.n_cells))
            expected, found = stored[key], batch["input_ids"].numpy()
            assert found.shape == expected.shape, (identifier, key)
            if expected.dtype.kind == "f":
                assert batch["input_ids"].dtype == torch.float32
                np.testing.assert_allclose(found, expected, rtol=1e-5, err_msg=f"{identifier} {key}")
            else:
                assert batch["input_ids"].dtype == torch.int64
                np.testing.assert_array_equal(found, expected, err_msg=f"{identifier} {key}")
            mask = key.replace("input_ids", "attention_mask")
            if mask in stored.files:
                np.testing.assert_array_equal(batch["attention_mask"].numpy(), stored[mask], err_msg=key)
            assert batch["cell_name"] == builder.store.obs_names.tolist()
            checked += 1
    say(f"golden batching: {checked} collator vectors reproduced")
    assert checked > 0


def test_class_labels(golden_dir, data_dir):
    """labels_celltype: class ids by alphabet, gathered by row in any order."""
    folder = golden_dir / "tokenization"
    cells = json.loads((folder / "cells_binned.json").read_text())
    store = Cells(cells)
    for path in sorted(folder.glob("collator_*.npz")):
        expected = np.load(path)["labels_celltype"]
        present = {int(number): cell["celltype"] for number, cell in zip(expected, cells, strict=True)}
        assert sorted(present) == sorted(present, key=present.get), "the ids are not alphabetical"
        builder = BatchBuilder(
            store,
            [FieldSpec("genes", "genes", column_ids=np.arange(1, store.shape[1] + 1))],
            BatchingConfig(collation_strategy="sequence_classification", max_length=64),
            labels={"celltype": expected},
        )
        rows = np.arange(len(cells))[::-1]
        np.testing.assert_array_equal(builder.build(rows)["labels"]["celltype"].numpy(), expected[rows])


def test_prevented_attention(golden_dir):
    stored = np.load(golden_dir / "transforms" / "prevent_attention.npz")
    for kind, mask_id in (("tok", 4), ("cve", -5)):
        ids, attended = stored[f"{kind}__ids"], stored[f"{kind}__attention_mask"]
        counts = attended.sum(axis=1).astype(np.int64) - 2
        marks = (ids == mask_id).astype(np.uint8) * kernels.MASKED
        found = np.zeros(stored[f"{kind}__expected"].shape, dtype=np.int64)
        kernels.attention_without_masked(counts, 1, marks, found)
        np.testing.assert_array_equal(found, stored[f"{kind}__expected"])


def test_masking_rates(golden_dir):
    """Shares of real positions that are selected, masked, switched and kept, per field, as the compatible package has them.

    Its second field is masked more rarely the more padding there is; here the rate is exact, so there it must be the asked-for one.
    """
    folder = golden_dir / "transforms"
    stored = json.loads((folder / "stochastic_statistics.json").read_text())
    tokenizer = folder / stored["tokenizer"] / "tokenizers"
    genes, expressions = read_tokens(tokenizer / "genes"), read_tokens(tokenizer / "expressions")
    rows = json.loads((folder / "deterministic_rows.json").read_text())["rows"]
    cells = [rows[f"cell{number}"]["input"] for number in stored["cells"]]
    store = Cells(
        [{**cell, "expressions": np.minimum(cell["expressions"], 9)} for cell in cells], ["cell"] * len(cells)
    )
    for name, case in stored["masking"].items():
        options = case["options"]
        masked = ("genes", "expressions")
        if "only" in options:
            masked = (masked[options["only"]],)
        weights = gene_mask_weights(store.var_names, options["pattern"]) if "pattern" in options else None
        settings = {
            "collation_strategy": "language_modeling",
            "max_length": case["max_length"],
            "change_ratio": case["change_ratio"],
            "mask_ratio": case["mask_ratio"],
            "switch_ratio": case["switch_ratio"],
            "comask_across_fields": options.get("comask_across_fields", False),
        }
        tokenized = not case["continuous_expressions"]
        plain = make_builder(store, genes, expressions, tokenized, **settings)
        builder = make_builder(store, genes, expressions, tokenized, masked, weights, **settings)
        shares = draw_shares(plain, builder, masked, draws=300, weights=weights)
        assert shares.pop("real positions") == case["n_real_positions"], name
        for measure, expected in {
            **case["fraction_of_real_positions"],
            "masked_in_both_fields": case["masked_in_both_fields"],
        }.items():
            if expected is None:
                continue
            mean, error = shares[measure]
            tolerance = 4 * np.hypot(error, expected["standard_error"]) + 0.003
            target = expected["mean"]
            if name.startswith("padded") and measure in ("expressions/selected", "expressions/masked"):
                target = case["change_ratio"] * (1 if measure.endswith("selected") else case["mask_ratio"])
            assert abs(mean - target) <= tolerance, (name, measure, mean, target, tolerance)
        if span := case["switched_expression_token_ids"]:
            low, high = shares["switched ids"]
            assert (low, high) == (span["min"], span["max"]), name


def draw_shares(plain: BatchBuilder, builder: BatchBuilder, masked, draws: int, weights) -> dict:
    """Mean and standard error, over `draws` epochs, of each share of the real positions."""
    everything = np.arange(plain.n_cells)
    before = plain.build(everything)
    unmasked, real = before["input_ids"], before["attention_mask"].bool()
    real[:, 0] = False
    real[torch.arange(len(real)), before["attention_mask"].sum(1) - 1] = False
    likely = torch.zeros_like(real)
    if weights is not None:
        ids = {int(builder._column_ids[column]) for column in np.flatnonzero(weights != 1)}
        likely = real & torch.isin(unmasked[:, 0].long(), torch.tensor(sorted(ids)))
    gathered: dict[str, list[float]] = {}
    switched_ids: list[torch.Tensor] = []
    for epoch in range(draws):
        batch = builder.build(everything, epoch)
        hidden = {}
        for number, field in enumerate(("genes", "expressions")):
            if field not in masked:
                continue
            ids, labels = batch["input_ids"][:, number], batch["labels"][field]
            selected = labels != -100
            assert not (selected & ~real).any()
            torch.testing.assert_close(labels[selected], unmasked[:, number][selected].to(labels.dtype))
            hidden[field] = ids == (
                -5 if ids.dtype == torch.float32 and field == "expressions" and not builder.fields[1].tokenized else 4
            )
            changed = selected & ~hidden[field] & (ids != unmasked[:, number])
            if field == "expressions":
                switched_ids.append(ids[changed])
            total = real.sum()
            for measure, where in {
                "selected": selected,
                "masked": hidden[field],
                "switched_and_changed": changed,
                "kept_as_is_or_switched_to_same": selected & ~hidden[field] & ~changed,
            }.items():
                gathered.setdefault(f"{field}/{measure}", []).append(float(where.sum() / total))
            if likely.any():
                gathered.setdefault(f"{field}/selected_on_RP_genes", []).append(
                    float((selected & likely).sum() / likely.sum())
                )
        if len(hidden) == 2:
            both = (hidden["genes"] & hidden["expressions"]).sum() / real.sum()
            gathered.setdefault("masked_in_both_fields", []).append(float(both))
    shares = {
        measure: (np.mean(values), np.std(values, ddof=1) / np.sqrt(draws)) for measure, values in gathered.items()
    }
    shares["real positions"] = int(real.sum())
    drawn = torch.cat(switched_ids) if switched_ids else torch.zeros(0)
    shares["switched ids"] = (int(drawn.min()), int(drawn.max())) if len(drawn) else None
    return shares
