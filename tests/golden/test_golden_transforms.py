"""Per-cell transforms against golden vectors of the compatible package: rows, zeros, whole-cell targets and labels exactly, random parts
within their errors. Every case comes from the files themselves.
"""

import json
from functools import cache

import numpy as np
import pytest
import torch
from reference_cells import SPECIAL, Cells, make_builder, read_tokens

from bmfm_pipeline.batching import FieldSpec, GeneTables, ZeroExposure, ordering

DRAWS = 400


@cache
def _stored(folder, name: str):
    return json.loads((folder / "transforms" / name).read_text())


@pytest.fixture
def zheng(golden_dir, data_dir):
    """The gene names of the file that the stored cells come from, and {cell: all of its genes and values}."""
    import anndata

    data = anndata.read_h5ad(data_dir / "zheng68k_165" / "zheng68k.h5ad")
    names, cells = data.var_names.tolist(), {}
    for entry in _stored(golden_dir, "cells.json"):
        row = data.X[entry["row"]]
        assert data.obs_names[entry["row"]] == entry["cell"]
        cells[f"cell{entry['row']}"] = {"genes": [names[i] for i in row.indices], "expressions": row.data.tolist()}
    return names, cells


@pytest.fixture
def toy(golden_dir):
    """The genes and expressions of the reduced vocabulary, and {cell: genes and values}."""
    tokens = golden_dir / "transforms" / "toy_tokenizer" / "tokenizers"
    rows = _stored(golden_dir, "deterministic_rows.json")["rows"]
    return read_tokens(tokens / "genes"), read_tokens(tokens / "expressions"), {k: v["input"] for k, v in rows.items()}


def _vocabulary(store) -> list[str]:
    return ["[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]", "[S]", "[T]", *dict.fromkeys(store.var_names)]


def _settings(case: str, arguments: dict, median_table: dict, store) -> tuple[dict, GeneTables | None, bool]:
    """(batch settings, gene tables, whether values are tokens) of a stored transform and its arguments."""
    settings, tables = {"max_mfi_data_len": arguments.get("max_length")}, None
    kind = case.split("_")[0]
    if kind == "rda":
        reads = arguments.get("target_read_resolution")
        settings |= {"rda_transform": reads or "equal", "depth_ids": (5, 6)}
        assert reads or arguments["downsample_threshold"] == float("inf")
        assert arguments["normalized_sum"] == 10000
    elif kind == "log":
        settings |= {"log_normalize_transform": True, "log_normalize_sum": arguments.get("normalized_sum", 10000)}
    elif kind == "sorted":
        settings["sequence_order"] = "sorted"
    elif kind == "median":
        tables = GeneTables(medians=np.array([median_table.get(gene, np.nan) for gene in store.var_names], np.float32))
    elif kind == "dropout":
        settings["sequence_dropout_factor"] = arguments["dropout_ratio"]
    elif kind == "limit":
        listed = np.array([gene in arguments["token_list"] for gene in store.var_names])
        tables = GeneTables(allowed=listed)
    else:
        assert kind in ("truncate", "downcast"), f"a transform that this test does not know: {case}"
    return settings, tables, kind == "downcast"


def test_rows(golden_dir):
    """Single rows, exactly; where the other package cuts only the genes of a cell, here their values stay beside them."""
    stored = _stored(golden_dir, "deterministic_rows.json")
    checked = 0
    for name, row in stored["rows"].items():
        store = Cells([row["input"]], [name])
        genes, raw = _vocabulary(store), row["input"]
        values = [*genes[:SPECIAL], *map(str, range(int(max(raw["expressions"])) + 2))]
        for case, arguments in stored["args"].items():
            settings, tables, tokenized = _settings(case, arguments, stored["median_table"], store)
            labels = FieldSpec("label_expressions", "values", tokenized=False, is_input=False)
            builder = make_builder(
                store, genes, values, tokenized, tables=tables, further=(labels,), padding=False, max_length=4096, **settings,
                collation_strategy="sequence_labeling",
            )  # fmt: skip
            batch = builder.build(np.array([0]))
            ids, expected = batch["input_ids"][0].numpy(), row["expected"][case]
            names, found = [genes[int(number)] for number in ids[0, 1:-1]], ids[1, 1:-1] - SPECIAL * tokenized
            if "PEER_WRONG" in case:
                kept = [(g, v) for g, v in zip(raw["genes"], raw["expressions"], strict=True) if g in expected["genes"]]
                expected = {"genes": [gene for gene, _ in kept], "expressions": [value for _, value in kept]}
            assert names == expected.get("genes", raw["genes"]), (name, case)
            np.testing.assert_allclose(found, expected["expressions"], rtol=1e-6, atol=1e-12, err_msg=f"{name} {case}")
            if "label_expressions" in expected:
                told = batch["labels"]["label_expressions"][0].numpy()
                np.testing.assert_allclose(told[3:-1], expected["label_expressions"][2:], rtol=1e-6, err_msg=case)
                assert (told[[0, 1, 2, -1]] == -100).all()
            checked += 1
    assert checked == len(stored["rows"]) * len(stored["args"])


def test_taking_turns(golden_dir):
    for case in _stored(golden_dir, "interleave.json"):
        own, zeros, share = case["a"], case["b"], case["p"]
        cycle = ZeroExposure(interleave_zero_ratio=share, granularity=case["granularity"]).cycle
        pattern = np.empty(len(own) + len(zeros), np.uint8)
        assert ordering.take_turns(len(own), len(zeros), *cycle, pattern) == len(pattern)
        queues = iter(own), iter(zeros)
        assert [next(queues[which]) for which in pattern] == case["expected"], case


def test_whole_cell_targets(golden_dir, toy, zheng):
    genes, expressions, cells = toy
    stored = np.load(golden_dir / "transforms" / "wced_targets.npz")
    numbers = [entry["row"] for entry in _stored(golden_dir, "cells.json")]
    cells = [cells[f"cell{number}"] for number in numbers[: stored["raw_labels__all"].shape[0]]]
    cases = {key.split("__")[0] for key in stored.files}
    for case in sorted(cases):
        store, settings = Cells(cells), {}
        exposed, tokenized = case == "zeros_exposed", case == "tokenized_inputs"
        if case in ("log_normalize_labels", "zeros_exposed"):
            settings["log_normalize_transform"] = True
        if exposed:
            store, settings["sequence_order"], settings["expose_zeros"] = (
                _aligned(cells, genes, zheng[0]),
                "sorted",
                True,
            )
        builder = make_builder(
            store, genes, expressions, tokenized, max_length=48, wced_targets=("input", "non_input", "all"), **settings
        )
        batch = builder.build(np.arange(len(cells)))
        np.testing.assert_allclose(batch["input_ids"].numpy(), stored[f"{case}__input_ids"], rtol=1e-5, err_msg=case)
        assert set(batch["labels"]) == {"expressions"}
        for name, found in batch["labels"]["expressions"].items():
            expected = stored[f"{case}__{name}"]
            assert found.dtype == torch.float32
            np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, err_msg=f"{case} {name}")


def _aligned(cells: list[dict], genes: list[str], order: list[str]) -> Cells:
    """The cells over one gene list: those of the vocabulary, in the order of the file that the cells come from."""
    known = set(genes[SPECIAL:])
    names = [gene for gene in order if gene in known]
    column = {gene: number for number, gene in enumerate(names)}
    store = Cells(cells)
    rows = [
        sorted((column[g], v) for g, v in zip(cell["genes"], cell["expressions"], strict=True) if g in column)
        for cell in cells
    ]
    store.indptr = np.cumsum([0, *map(len, rows)]).astype(np.int64)
    store.indices = np.array([place for row in rows for place, _ in row], np.int32)
    store.data = np.array([value for row in rows for _, value in row], np.float32)
    store.var_names, store.shape = names, (len(cells), len(names))
    return store


def test_labels_of_fields_that_are_no_input(golden_dir, toy):
    genes, expressions, cells = toy
    stored = np.load(golden_dir / "transforms" / "label_expressions.npz")
    numbers = [entry["row"] for entry in _stored(golden_dir, "cells.json")]
    paired = _stored(golden_dir, "sequence_labeling_input.json")
    labels = FieldSpec("label_expressions", "values", tokenized=False, is_input=False)
    for case in sorted({key.split("__")[0] for key in stored.files}):
        ids, told = stored[f"{case}__input_ids"], stored[f"{case}__label_expressions"]
        settings = {"max_length": ids.shape[2], "collation_strategy": "sequence_labeling"}
        if case.endswith("sorted"):
            settings["sequence_order"] = "sorted"
        further = [labels]
        if case.startswith("rda_equal"):
            store = Cells([cells[f"cell{number}"] for number in numbers[: len(ids)]])
            settings |= {"rda_transform": "equal", "depth_ids": (0, 0)}
            settings["max_mfi_data_len"] = 20 if "mfi20" in case else None
        else:
            store = Cells(paired)
            for name in ("label_expressions", "perturbations"):
                layer = Cells([{**cell, "expressions": [float(value) for value in cell[name]]} for cell in paired])
                setattr(store, name, layer)
            further = [
                FieldSpec("perturbations", "values", value_ids=np.arange(5, 7), layer="perturbations"),
                FieldSpec("label_expressions", "values", tokenized=False, is_input=False, layer="label_expressions"),
            ]
        batch = make_builder(store, genes, expressions, False, further=further, **settings).build(np.arange(len(ids)))
        np.testing.assert_allclose(batch["input_ids"].numpy(), ids, rtol=1e-5, err_msg=case)
        np.testing.assert_allclose(batch["labels"]["label_expressions"].numpy(), told, rtol=1e-5, err_msg=case)


def _draws(builder, row: int = 0, epochs: int = DRAWS) -> list[np.ndarray]:
    """The genes and values (2, n) of one cell in many epochs, special tokens left out."""
    return [
        batch["input_ids"][0, :, 1 : int(batch["attention_mask"][0].sum()) - 1].numpy()
        for batch in (builder.build(np.array([row]), epoch) for epoch in range(epochs))
    ]


def _agree(found, expected: dict, what: str) -> None:
    mean, error = np.mean(found), np.std(found, ddof=1) / np.sqrt(len(found))
    assert abs(mean - expected["mean"]) <= 4 * np.hypot(error, expected["standard_error"]) + 1e-6, (
        what,
        mean,
        expected,
    )


def _single(cells: dict, number: str, **settings):
    """A builder over one cell that shows its values as they are."""
    store = Cells([cells[number]])
    options = {"padding": False, "max_length": 4096, "mlm": False, **settings}
    return make_builder(store, _vocabulary(store), [], tokenized=False, **options)


def _check_dropout(case: str, number: str, cells: dict, told: dict) -> None:
    size = case.split("_")[1]
    if size != "chunk":
        builder = _single(cells, number, sequence_dropout_factor=float(size))
        _agree([draw.shape[1] / told["n"] for draw in _draws(builder)], told["kept_fraction"], case)
        return
    block, last = int(case.split("_")[2]), int(case.split("_")[-1])
    builder = _single(cells, number, sequence_dropout_factor=block, max_mfi_data_len=last + 1)
    whole = _draws(_single(cells, number, max_mfi_data_len=last + 1), epochs=1)[0][0]
    starts = []
    for genes, _ in _draws(builder):
        gone = np.flatnonzero(~np.isin(whole, genes))
        assert len(gone) == block == gone[-1] - gone[0] + 1
        starts.append(gone[0])
    _agree(starts, told["start"], case)
    assert (min(starts), max(starts)) == (told["start_min"], told["start_max"])


def _check_selective(case: str, number: str, cells: dict, told: dict) -> None:
    store = Cells([cells[number]])
    weights = np.arange(len(store.var_names)) % 4 + 1
    builder = make_builder(
        store, _vocabulary(store), [], False, padding=False, max_length=4096, mlm=False,
        tables=GeneTables(dropout_weights=weights.astype(np.float32)), selective_dropout=float(case.split("_")[-1]),
    )  # fmt: skip
    names = np.arange(len(weights)) + 7
    kept = np.stack([np.isin(names, genes) for genes, _ in _draws(builder)])
    for weight in range(1, 5):
        expected = told[f"weight_{weight}"]
        share, n = float(1 - kept[:, weights == weight].mean()), kept[:, weights == weight].size
        error = np.sqrt(share * (1 - share) * (1 / n + 1 / expected["n"]))
        assert abs(share - expected["dropped_fraction"]) <= 4 * error, (case, weight, share)


def _check_depth(case: str, number: str, cells: dict, told: dict, kind: str) -> None:
    cell = cells[number]
    if kind == "below_1000":
        size = next(n for n in range(1, 2000) if sum(cell["expressions"][:n]) == told["total"])
        cells = {number: {key: cell[key][:size] for key in ("genes", "expressions")}}
    poisson = case.startswith("poisson")
    builder = _single(
        cells, number, rda_transform="poisson_downsample" if poisson else "downsample", depth_ids=(5, 6),
    )  # fmt: skip
    seen = _draws(builder, epochs=DRAWS if poisson else 1500)
    shares = np.array([np.expm1(values[0].astype(float)) / told["total"] for _, values in seen])
    np.testing.assert_allclose([np.expm1(values[1]) for _, values in seen], told["total"], rtol=1e-3)
    nonzero = np.array([(values[2:] > 0).mean() for _, values in seen])
    if poisson:
        _agree(shares, told["S_over_T"], case)
        _agree(1 - nonzero, told["fraction_zeroed"], case)
        assert abs(np.std(shares) / told["S_over_T_sd"] - 1) < 4 / np.sqrt(DRAWS)
        return
    _agree(shares, told["S_over_T"], case)
    _agree(nonzero, told["fraction_nonzero"], case)
    whole = np.isclose(shares, 1, atol=1e-4)
    _agree(whole, told["fraction_not_downsampled"], case)
    if reduced := told["S_over_T_when_downsampled"]:
        own = shares[~whole]
        error = np.hypot(own.std() / np.sqrt(len(own)), np.sqrt(reduced["var"] / reduced["n"]))
        assert abs(own.mean() - reduced["mean"]) < 4 * error
        assert abs(own.var() / reduced["var"] - 1) < 4 * np.sqrt(2 * 0.6 / len(own) * 2)
        found = np.quantile(own, [0.05, 0.25, 0.5, 0.75, 0.95])
        assert np.abs(found - reduced["quantiles_5_25_50_75_95"]).max() < 0.08


def _check_zeros(options: dict, number: str, cells: dict, told: dict, genes, expressions, order) -> None:
    """The batch is this cell and another one, which only the number of genes that it alone expresses tells."""
    for other in (name for name in cells if name != number):
        store, row = _aligned([cells[number], cells[other]], genes, order), 0
        own, elsewhere = store.indptr[1], np.setdiff1d(store.indices, store.indices[: store.indptr[1]])
        if len(elsewhere) == told["n_batch_zero"]:
            break
    assert (own, len(elsewhere), store.shape[1]) == (told["n_nonzero"], told["n_batch_zero"], told["n_total"])
    builder = make_builder(
        store, genes, expressions, False, mlm=False, padding=False, max_length=4096, max_mfi_data_len=told["max_length"],
        expose_zeros=True, zeros=ZeroExposure(**options),
    )  # fmt: skip
    batches = [builder.build(np.arange(2), epoch)["input_ids"][row].numpy() for epoch in range(DRAWS)]
    shown = [ids[:, 1 : 1 + told["max_length"]] for ids in batches]
    _agree([(values > 0).mean() for _, values in shown], told["fraction_nonzero"], str(options))
    _agree([(values > 0).all() for _, values in shown], told["fraction_draws_nonzero_only"], str(options))
    _agree([(values > -1).sum() for _, values in shown], told["length"], str(options))
    zeros = {genes[int(token)] for ids, values in shown for token in ids[values == 0]}
    if told["share_of_zeros_that_are_expressed_in_batch"] is not None:
        assert told["share_of_zeros_that_are_expressed_in_batch"] == 1
        assert zeros <= {store.var_names[column] for column in elsewhere}


def test_random_transforms(golden_dir, toy, zheng):
    genes, expressions, _ = toy
    order, cells = zheng
    told = _stored(golden_dir, "stochastic_statistics.json")["sample_transforms"]
    for key, expected in told.items():
        case, number, *rest = key.split("/")
        if case.startswith("dropout"):
            _check_dropout(case, number, cells, expected)
        elif case.startswith("selective_dropout"):
            _check_selective(case, number, cells, expected)
        elif case.startswith(("rda_downsample", "poisson_downsample")):
            _check_depth(case, number, cells, expected, rest[0] if rest else "full")
        else:
            assert case == "pad_zero", f"a statistic that this test does not know: {key}"
            _check_zeros(json.loads(rest[0]), number, cells, expected, genes, expressions, order)
