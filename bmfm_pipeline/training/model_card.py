"""The card of a model (README.md): what it is, its numbers, what it was trained on, its limits, how it is loaded.

Made of the records beside the weights; the numbers of a test stand in it, beside its controls, when there is one.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bmfm_pipeline.storage import read_json
from bmfm_pipeline.training.records import PREPROCESSING, TRAINING
from bmfm_pipeline.training.temperature import CALIBRATION

CARD = "README.md"
NAMES = {
    "scbert": "BERT encoder",
    "scperformer": "Performer encoder",
    "scnystromformer": "Nystromformer encoder",
    "scmodernbert": "ModernBERT encoder",
    "scllama": "Llama-style encoder",
}
# More classes than these are counted, not listed.
LISTED = 60


@dataclass(frozen=True)
class TestNumbers:
    """What an evaluation found: rows of metrics.json, sentences about the differences, notes; and how models and controls are called.

    `per_class` {label: [{"class", "support", "precision", "recall", "f1", ..}]}; `counted` {target: what n counts}, cells where not named. `dataset`: the name of the
    tested cells' data where they are not the model's.
    """

    __test__ = False
    rows: list[dict[str, Any]]
    verdicts: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    level: float = 0.95
    names: dict[str, str] = field(default_factory=dict)
    descriptions: dict[str, str] = field(default_factory=dict)
    per_class: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    counted: dict[str, str] = field(default_factory=dict)
    dataset: str = ""


def write_card(
    folder: Path, model: Path, *, tests: TestNumbers | None = None, license: str | None = None, name: str | None = None
) -> None:
    """Write README.md into `folder` about the model in folder `model`, with the numbers of a test where there are any."""
    (folder / CARD).write_text(model_card(model, tests=tests, license=license, name=name), encoding="utf-8")


def model_card(
    model: Path, *, tests: TestNumbers | None = None, license: str | None = None, name: str | None = None
) -> str:
    """The card as markdown behind a YAML header, as Hugging Face reads it.

    `license` is named only when given; `name` is what the model is called, by default after its data.
    """
    import yaml

    config, training, data = (_read(model / file) for file in ("config.json", TRAINING, PREPROCESSING))
    rows = tests.rows if tests else []
    title = name or f"{training.get('name', 'model')}-{config['model_type']}-{training.get('stage', 'model')}"
    header: dict[str, Any] = {"library_name": "bmfm_pipeline"}
    if license:
        header["license"] = license
    header["tags"] = _tags(config, training)
    if results := _results(rows, training, config, tests.dataset if tests is not None else ""):
        header["model-index"] = [{"name": title, "results": results}]
    sections = [
        f"# {title}",
        _what(config, training),
        "## Numbers",
        *(_tested(tests) if tests else [UNTESTED]),
        *_validated(training),
        "## Data",
        _data(training, data),
        "## Training",
        _training(training),
        "## Limits",
        _limits(config, rows, _read(model / CALIBRATION)),
        "## Use",
        _use(config, model),
    ]
    text = yaml.safe_dump(header, sort_keys=False, allow_unicode=True)
    return f"---\n{text}---\n\n" + "\n\n".join(part for part in sections if part) + "\n"


def _read(file: Path) -> dict[str, Any]:
    return read_json(file) if file.exists() else {}


def _tags(config: dict[str, Any], training: dict[str, Any]) -> list[str]:
    fields = {entry["field_name"] for entry in config["fields"]}
    domain = ["single-cell", "transcriptomics"] if "genes" in fields else ["dna"]
    stage = [training["stage"]] if training.get("stage") else []
    return ["bmfm_pipeline", "biology", *domain, config["model_type"], *stage]


def _labels(config: dict[str, Any]) -> list[dict[str, Any]]:
    return config.get("label_columns") or []


def _kind(target: str, config: dict[str, Any]) -> tuple[str, str]:
    for label in _labels(config):
        if label["label_column_name"] == target:
            return (
                ("tabular-regression", "numbers")
                if label["is_regression_label"]
                else ("tabular-classification", "classes")
            )
    return "fill-mask", "masked values"


def _results(
    rows: list[dict[str, Any]], training: dict[str, Any], config: dict[str, Any], dataset: str = ""
) -> list[dict[str, Any]]:
    """The model-index of the header: what the model scored on test cells, else in validation."""
    name = training.get("name", "data")
    results = []
    for target in dict.fromkeys(row["target"] for row in rows):
        own = [row for row in rows if row["target"] == target and row["model"] == "model" and row["value"] is not None]
        kind, words = _kind(target, config)
        metrics = [
            {
                "type": row["metric"],
                "value": row["value"],
                "name": f"{row['metric']} of {target}",
                "args": {key: row[key] for key in ("n", "ci_low", "ci_high", "ci_method") if row[key] is not None},
            }
            for row in own
        ]
        tested = dataset or name
        place = {"name": tested, "type": tested, "split": own[0]["split"]} if own else {}
        if own:
            results.append({"task": {"type": kind, "name": f"{target}: {words}"}, "dataset": place, "metrics": metrics})
    if not results and (scores := _scores(training)):
        task = {
            "type": "tabular-classification" if _labels(config) else "fill-mask",
            "name": training.get("stage", "training"),
        }
        metrics = [{"type": key, "value": value, "name": key} for key, value in scores.items()]
        results.append(
            {"task": task, "dataset": {"name": name, "type": name, "split": "validation"}, "metrics": metrics}
        )
    return results


def _scores(training: dict[str, Any]) -> dict[str, float]:
    return {key: value for key, value in training.get("validation", {}).items() if isinstance(value, int | float)}


def _what(config: dict[str, Any], training: dict[str, Any]) -> str:
    summary = training.get("summary", {})
    fields = ", ".join(entry["field_name"] for entry in config["fields"] if entry["is_input"])
    size = f"{summary['parameters']:,} parameters, " if summary.get("parameters") else ""
    lines = [
        f"{NAMES.get(config['model_type'], config['model_type'])}: {size}{config['num_hidden_layers']} layers of width "
        f"{config['hidden_size']}, {config['num_attention_heads']} heads; it reads {fields}."
    ]
    for label in _labels(config):
        column, classes = label["label_column_name"], label.get("class_names") or []
        if label["is_regression_label"]:
            lines.append(f"Predicts the number `{column}`.")
        elif len(classes) > LISTED:
            lines.append(f"Predicts `{column}`, one of {len(classes)} classes (label_dict.json lists them).")
        else:
            several = "any of" if label.get("is_multilabel") else "one of"
            lines.append(f"Predicts `{column}`, {several} {len(classes)} classes: {', '.join(map(_plain, classes))}.")
    if not _labels(config):
        lines.append("It predicts masked tokens and gives embeddings of cells; it knows no labels.")
    return "\n".join(lines)


def _plain(text: str) -> str:
    """A name from data as it stands, in markdown."""
    return "`" + str(text).replace("`", "'").replace("\n", " ") + "`"


UNTESTED = "Not tested: nothing is known of cells that took no part in training and its validation."


def _tested(tests: TestNumbers) -> list[str]:
    """Each target's metrics with intervals, beside the controls on the same cells; then what the differences say."""
    parts = []
    for target in dict.fromkeys(row["target"] for row in tests.rows):
        own = [row for row in tests.rows if row["target"] == target]
        models = list(dict.fromkeys(row["model"] for row in own))
        found = {(row["metric"], row["model"]): row for row in own}
        count = next((row["n"] for row in own if row["n"]), None)
        methods = ", ".join(dict.fromkeys(row["ci_method"] for row in own if row["ci_low"] is not None))
        cells = f"{own[0]['split']} {tests.counted.get(target, 'cells')}"
        cells = cells if count is None else f"{count:,} {cells}"
        brackets = f"; in brackets {100 * tests.level:g} % intervals ({methods})" if methods else ""
        parts.append(f"{_plain(target)} on {cells}, beside controls on the same cells{brackets}:")
        metrics = dict.fromkeys(row["metric"] for row in own)
        table = [[metric, *(_score(found.get((metric, model))) for model in models)] for metric in metrics]
        parts.append(_table(["metric", *(tests.names.get(model, model) for model in models)], table))
        described = [model for model in models if model in tests.descriptions]
        parts.append(_list(f"{tests.names.get(model, model)}: {tests.descriptions[model]}" for model in described))
        classes = [entry for entry in tests.per_class.get(target, []) if entry["support"]]
        if 2 < len(classes) <= LISTED:
            parts += [f"Classes of {_plain(target)}:", _classes(classes)]
    return [*parts, _list(tests.verdicts), _list(tests.notes)]


def _classes(classes: list[dict[str, Any]]) -> str:
    rows = [
        [
            _plain(entry["class"]),
            f"{entry['support']:,}",
            *(_number_or_none(entry[name]) for name in ("precision", "recall", "f1")),
        ]
        for entry in classes
    ]
    return _table(["class", "test cells", "precision", "recall", "F1"], rows)


def _number_or_none(value: float | None) -> str:
    return "" if value is None else _number(value)


def _score(row: dict[str, Any] | None) -> str:
    if row is None or row["value"] is None:
        return ""
    if row["ci_low"] is None or row["ci_high"] is None:
        return _number(row["value"])
    return f"{_number(row['value'])} [{_number(row['ci_low'])}, {_number(row['ci_high'])}]"


def _number(value: float) -> str:
    return f"{value:.3f}" if value == 0 or 0.01 <= abs(value) < 1000 else f"{value:.4g}"


def _validated(training: dict[str, Any]) -> list[str]:
    scores = _scores(training)
    if not scores:
        return []
    count = training.get("summary", {}).get("dev_cells")
    cells = f" on {count:,} cells" if count else ""
    said = f"Validation{cells} of the weights published here (they were chosen by the validation loss, so these numbers favour them):"
    own = {key: value for key, value in scores.items() if not key.endswith("_constant")}
    guesses = [scores.get(f"{key}_constant") for key in own]
    header = ["score", "this model", *(["constant guess"] if any(guess is not None for guess in guesses) else [])]
    table = [
        [key, _number(value), "" if guess is None else _number(guess)][: len(header)]
        for (key, value), guess in zip(own.items(), guesses, strict=True)
    ]
    return [said, _table(header, table)]


def _list(sentences) -> str:
    return "\n".join(f"- {text}" for text in sentences)


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _data(training: dict[str, Any], data: dict[str, Any]) -> str:
    lines = []
    if split := data.get("split"):
        counts = ", ".join(f"{name} {count:,}" for name, count in split["counts"].items())
        lines.append(
            f"- {training.get('name', 'data')}: {counts} cells; split {split['made']} (hash {split['hash'][:16]})"
        )
    for step in data.get("steps", []):
        lines.append(f"- {step['step']}: {step['cells']:,} cells, {step['genes']:,} genes")
    for reason, count in data.get("dropped_cells", {}).items():
        lines.append(f"- left out: {count:,} cells, {reason}")
    if known := data.get("vocabulary", {}).get("known"):
        lines.append(f"- {known:,} of {data['vocabulary']['genes']:,} genes are in the vocabulary")
    lines += [f"- {text}" for text in data.get("notes", [])]
    return "\n".join(lines) or "Not recorded."


def _training(training: dict[str, Any]) -> str:
    if not training:
        return "Not recorded."
    summary, start = training["summary"], training["started_from"]
    begin = (
        f"from a {start['stage']} model (key {start['id'][:12]})"
        if start
        else "from scratch, without a pretrained model"
    )
    losses = ", ".join(
        f"{loss['name']} on {loss.get('label_column_name') or loss.get('field_name')}"
        for loss in training["losses"] or []
    )
    lines = [
        f"- {training['stage']}, started {begin}",
        f"- losses: {losses}",
        f"- {summary.get('steps')} steps of {training['batch_size']} cells ({summary.get('epochs')} epochs of "
        f"{summary.get('train_cells', 0):,} cells), at most {training['max_length']} tokens a cell; learning rate "
        f"{training['trainer']['learning_rate']:g}, seed {training['seed']}, precision {summary.get('precision')}, {summary.get('accelerator')}",
    ]
    if (trained := summary.get("trained_parameters")) and trained != summary.get("parameters"):
        lora = training["trainer"].get("lora_config")
        how = (
            f"{'DoRA' if lora['use_dora'] else 'LoRA'} of rank {lora['r']}, merged here and apart in adapter/"
            if lora
            else "others frozen"
        )
        lines.append(f"- {trained:,} parameters were trained: {how}")
    lines += [f"- {text}" for text in training.get("notes", [])]
    versions = ", ".join(f"{name} {number}" for name, number in training["versions"].items())
    return "\n".join([*lines, f"- {versions}"])


def _limits(config: dict[str, Any], rows: list[dict[str, Any]], calibration: dict[str, Any]) -> str:
    lines = [
        "- The numbers above are of cells of the same data as those it learned from. Other laboratories, tissues, species and protocols "
        "are not covered by them: measure on cells of your own.",
        "- Genes that are not in its vocabulary are not read.",
    ]
    classes = [label for label in _labels(config) if not label["is_regression_label"]]
    if classes:
        unsure = "; `--unknown-below auto` leaves out those it is least sure of" if calibration else ""
        lines.append(f"- Every cell is given a class it knows, also a cell of a kind it has never seen{unsure}.")
        lines += [_calibrated(label["label_column_name"], calibration) for label in classes]
    small = [row["n"] for row in rows if row["n"] and row["n"] < 1000]
    if small:
        lines.append(f"- {min(small):,} test cells are few: read the intervals, not the numbers between them.")
    lines.append("- It is not made for decisions about patients.")
    return "\n".join(lines)


def _calibrated(label: str, calibration: dict[str, Any]) -> str:
    entry = calibration.get(label, {})
    if entry.get("temperature", 1.0) == 1:
        why = f" ({entry['note'].removesuffix(': not calibrated')})" if "note" in entry else ""
        return f"- Probabilities of {_plain(label)} have not been calibrated{why}."
    return (
        f"- Probabilities of {_plain(label)} are those at temperature {_number(entry['temperature'])}, fitted to {entry['n']:,} validation "
        f"cells (negative log-likelihood {_number(entry['nll_before'])} before, {_number(entry['nll_after'])} after); `bmfm predict` applies it, "
        "the logits are as the network gives them."
    )


def _use(config: dict[str, Any], model: Path) -> str:
    adapter = (
        "\n\n`adapter/` has the low-rank adapter apart, in the form of peft, for the model that the training started from."
        if (model / "adapter").is_dir()
        else ""
    )
    return (
        "```\nbmfm predict --model FOLDER --input cells.h5ad --output DIR\n```\n\n"
        "takes counts of whole cells and applies the gene names and the normalisation stored here (transforms.json). In Python:\n\n"
        "```python\nimport bmfm_pipeline.models  # makes the type known\nfrom transformers import AutoModel\n\n"
        'model = AutoModel.from_pretrained("FOLDER")\n```\n\n'
        "`config.json` and `model.safetensors` are the network, `tokenizers/` its vocabulary by field, `label_dict.json` its classes, "
        "`preprocessing.json` and `training.json` the records that this page is made of." + adapter
    )
