"""Preprocess sequences: check and clean, split, fix labels and vocabulary, cut into tokens, publish. One function per step."""

import logging
import shutil
from typing import Any

import numpy as np

from bmfm_pipeline.config import RunConfig, require_path
from bmfm_pipeline.config.sequences import FIELD, PLACE
from bmfm_pipeline.config.splits import resolve_split
from bmfm_pipeline.data.label_files import write_label_dict
from bmfm_pipeline.data.label_values import missing_mask, not_numbers
from bmfm_pipeline.data.labels import build_label_dict, count_labels, empty_or_none, labels_unseen_in_training
from bmfm_pipeline.data.sequences import (
    SequenceSource,
    SequenceWriter,
    clean,
    find_leakage,
    open_sequences,
    reverse_complement,
)
from bmfm_pipeline.data.sequences.cleaning import CleanedFiles, class_texts
from bmfm_pipeline.data.sequences.genome import GenomeWindows, is_fasta, open_genome
from bmfm_pipeline.data.sequences.known_variants import KnownVariants
from bmfm_pipeline.data.splits import read_split
from bmfm_pipeline.errors import DataError, StorageError
from bmfm_pipeline.stages.jobs import Job
from bmfm_pipeline.stages.labels import input_dictionary
from bmfm_pipeline.stages.preprocess import publish as publish  # the last step is that of cells
from bmfm_pipeline.stages.running import Progress, step_result
from bmfm_pipeline.stages.sequences.inputs import files_of_windows, find_sequences
from bmfm_pipeline.stages.splitting import make_and_record, split_rows, split_summary
from bmfm_pipeline.stages.tracked import start_tracking
from bmfm_pipeline.storage import (
    content_hash,
    hash_file,
    is_remote,
    localise,
    read_json,
    strip_userinfo,
    write_json_atomic,
)
from bmfm_pipeline.vocabulary.alleles import signs
from bmfm_pipeline.vocabulary.nucleotides import make_byte_pairs, make_kmers
from bmfm_pipeline.vocabulary.sequences import SequenceTokenizer

logger = logging.getLogger(__name__)
# Training letters that pieces are learned from: a sample of more teaches the same pieces.
LETTERS_TO_LEARN_FROM = 20_000_000
# Of more letters only identical sequences are looked for: the comparison of pieces would not fit into memory.
MOST_LETTERS_COMPARED = 500_000_000
BLOCK = 20_000  # sequences cut together
MOST_SET_ASIDE = 0.1


def _open(job: Job, with_variants: bool = False) -> tuple[RunConfig, SequenceSource | GenomeWindows]:
    run = RunConfig.model_validate(job.config)
    uri = find_sequences(run)
    if is_remote(uri) and content_hash(uri) != job.inputs["source"]["id"]:
        raise StorageError(
            f"{strip_userinfo(uri)}: changed since the run began; wait until it is complete and run again"
        )
    settings = run.data_module.sequences
    if not is_fasta(uri):
        return run, open_sequences(localise(uri), settings.column)
    beside = {name: localise(file) for name, file in files_of_windows(run, uri).items()}
    known = None
    if with_variants and "variants" in beside:  # only where letters are read: it takes longer than the genome
        known = KnownVariants(beside["variants"], settings.windows.least_frequency)
    return run, open_genome(localise(uri), settings.windows, beside.get("bed"), known)


def _cleaned(job: Job) -> CleanedFiles:
    return CleanedFiles(job.run_dir / "source")


def check(job: Job, on_progress: Progress) -> dict[str, Any]:
    """Read every sequence once: letters cleaned and counted, empty ones set aside, labels looked at."""
    shutil.rmtree(job.staging, ignore_errors=True)
    job.staging.mkdir(parents=True)
    start_tracking(job)
    run, source = _open(job, with_variants=True)
    known = getattr(source, "variants", None)
    problems = [text for column in run.label_columns for text in _label_problems(source.obs, column)]
    if problems:
        raise DataError(f"{find_sequences(run)}: {'; '.join(problems)}")
    files, changed = _cleaned(job), {}
    with files.writing(len(source.obs)) as writer:
        for first, letters, starts in source.blocks():
            part = clean(letters, starts, run.data_module.sequences.upper_case, known is not None)
            for what, count in part.changed.items():
                changed[what] = changed.get(what, 0) + count
            writer.add(first, part)
    lengths = files.lengths
    empty = np.flatnonzero(lengths == 0)
    if len(empty) > MOST_SET_ASIDE * len(lengths):
        raise DataError(
            f"{find_sequences(run)}: {len(empty):,} of {len(lengths):,} sequences are empty, e.g. {source.obs.index[empty[0]]}; is "
            f"'{source.column}' the column of the sequences? Name it with {PLACE}.column"
        )
    if len(empty):
        logger.warning("%d empty sequences are left out, e.g. %s", len(empty), source.obs.index[empty[0]])
    for what, count in changed.items():
        if count:
            logger.warning("%s", _CHANGES[what].format(count=f"{count:,}", letters=f"{len(files.letters):,}"))
    if known is not None and (words := known.in_words()):
        logger.warning("variants that were not written: %s", words)
    kept = lengths[lengths > 0]
    report = {
        "sequences": len(kept),
        "set_aside_empty": len(empty),
        "letters": int(kept.sum()),
        "shortest": int(kept.min()),
        "longest": int(kept.max()),
        "column": source.column,
        **{f"files_{name or 'one'}": size for name, size in source.sizes.items()},
        **{f"letters_{what}": count for what, count in changed.items()},
        **{f"windows_{what}": count for what, count in getattr(source, "skipped", {}).items()},
        **({} if known is None else {f"variants_{what}": count for what, count in known.counts.items()}),
        **({} if known is None else {"alleles": signs(known.codes)}),
    }
    file = job.staging / "check.json"
    write_json_atomic(file, report)
    rows = [{"what": name, "found": value} for name, value in report.items()]
    return {"uri": str(file), "hash": hash_file(file), "summary": report, "table": rows}


_CHANGES = {
    "lower_case": "{count} of {letters} letters were lower case and are read as capitals",
    "rna": "{count} of {letters} letters were U, as RNA has it, and are read as T",
    "spaces": "{count} blanks inside of sequences were left out",
    "variants": "{count} of {letters} letters are places of variants",
    "ambiguous": "{count} of {letters} letters are none of A, C, G, T and N; pieces with them are unknown to the model",
}


def _label_problems(obs, column) -> list[str]:
    name = column.label_column_name
    if name not in obs.columns:
        return [f"no column '{name}' for a label; columns are {', '.join(obs.columns)}"]
    values = obs[name]
    if column.is_regression_label:
        bad = not_numbers(values.to_numpy())
        return [f"column '{name}' is a regression label and holds {bad}"] if bad else []
    known = values[~missing_mask(values)]
    if not len(known):
        return [f"column '{name}' is empty"]
    classes = known.nunique()
    if not column.is_multilabel and classes > max(200, len(known) // 5):
        return [
            f"column '{name}' has {classes:,} different values in {len(known):,} rows, which are no classes; numbers need "
            "is_regression_label: true"
        ]
    return []


def _obs(job: Job) -> tuple[RunConfig, Any, np.ndarray]:
    """(run, obs of the sequences that are used, their rows in the tables)."""
    run, source = _open(job)
    rows = np.flatnonzero(_cleaned(job).lengths > 0)
    obs = source.obs.iloc[rows].copy()
    for column in run.label_columns:
        if column.is_regression_label:
            obs[column.label_column_name] = obs[column.label_column_name].astype(float)
        elif not column.is_multilabel:
            obs[column.label_column_name] = class_texts(obs[column.label_column_name])
    return run, obs, rows


def split(job: Job, on_progress: Progress) -> dict[str, Any]:
    """Assign every sequence to train, dev or test, and look for training sequences in the others."""
    run, obs, rows = _obs(job)
    entries = [entry for entry in run.label_columns if not entry.is_regression_label]
    separators = {entry.label_column_name: entry.multilabel_str_sep for entry in entries if entry.is_multilabel}
    labels = [entry.label_column_name for entry in entries]
    made, info = make_and_record(job, resolve_split(run), obs, [name for name in labels if name not in separators])
    unseen = labels_unseen_in_training(obs, made.assigned, labels, separators)
    summary = {**split_summary(info), "labels_not_in_training": unseen}
    leakage = run.data_module.sequences.leakage
    if leakage != "off":
        found = find_leakage(
            *_cleaned(job).of_rows(rows),
            made.assigned.to_numpy(),
            obs.index.to_numpy(),
            most_letters=MOST_LETTERS_COMPARED,
        )
        write_json_atomic(job.staging / "leakage.json", found.to_dict())
        summary["leakage"] = found.sentence() or "no test or dev sequence is in training"
        if found.total and leakage == "refuse":
            raise DataError(
                f"{PLACE}.leakage: {found.sentence()} (e.g. {' = '.join(found.examples[0][:2])}); remove them from the tables, or set it to "
                "report"
            )
        if found.total:
            logger.warning("%s: scores on them tell of memory, not of learning", found.sentence())
    file = str(job.staging / "split.csv")
    return {"uri": file, "hash": info["hash"], "summary": summary, "table": split_rows(info)}


def label_dictionary(job: Job, on_progress: Progress) -> dict[str, Any]:
    """Fix the class ids of every label column; a dictionary file of the user is honoured, never silently extended."""
    run, obs, _ = _obs(job)
    known = build_label_dict(obs, run.label_columns, path=input_dictionary(job, run))
    labels = {column.label_column_name: known[column.label_column_name] for column in run.label_columns}
    file = job.staging / "label_dict.json"
    write_label_dict(file, labels)
    counts = count_labels(obs, run.label_columns, labels)
    for line in empty_or_none(obs, run.label_columns):
        logger.warning("%s", line)
    write_json_atomic(job.staging / "labels.json", counts)
    summary = {name: len(values) for name, values in labels.items()}
    rows = [{"label": name, "classes": summary[name], "without": counts[name]["missing"]} for name in counts]
    return {"uri": str(file), "hash": hash_file(file), "summary": summary, "table": rows}


def vocabulary(job: Job, on_progress: Progress) -> dict[str, Any]:
    """Fix the pieces that sequences are cut into: learned from training sequences, or copied from a tokenizer folder."""
    run, _, rows = _obs(job)
    folder = job.staging / "tokenizers" / FIELD
    wish = run.data_module.sequences.vocabulary
    also = step_result(job, "check")["summary"].get("alleles", "")
    if run.tokenizer.is_folder:
        base = localise(require_path(run.tokenizer.identifier, "tokenizer.identifier"))
        found = next(
            (path for path in (base / "tokenizers" / FIELD, base / FIELD, base) if (path / "tokenizer.json").exists()),
            None,
        )
        if found is None:
            raise DataError(f"tokenizer.identifier: {base} holds no tokenizers/{FIELD}/tokenizer.json")
        SequenceTokenizer(found, run.data_module.sequences.upper_case).save(folder)
        how = f"from {strip_userinfo(run.tokenizer.identifier)}"
    elif wish.kind == "bpe":
        train = rows[read_split(job.staging).to_numpy() == "train"]
        if not len(train):
            raise DataError(
                "the split has no training sequences to learn pieces from; name a tokenizer folder with tokenizer.identifier, or set "
                f"{PLACE}.vocabulary.kind=kmer"
            )
        lengths = _cleaned(job).lengths[train]
        if lengths.sum() > LETTERS_TO_LEARN_FROM:
            order = np.random.default_rng(run.seed.seed_value).permutation(len(train))
            train = train[np.sort(order[: np.searchsorted(np.cumsum(lengths[order]), LETTERS_TO_LEARN_FROM)])]
        make_byte_pairs(folder, _cleaned(job).texts(train), wish.size, also)
        how = f"byte pairs learned from {len(train):,} training sequences"
    else:
        make_kmers(folder, 1 if wish.kind == "nucleotide" else wish.k, also)
        how = "single nucleotides" if wish.kind == "nucleotide" else f"pieces of {wish.k}"
    size = len(SequenceTokenizer(folder).vocabulary)
    summary = {"pieces": size, "made": how}
    write_json_atomic(job.staging / "vocabulary.json", summary)
    return {"uri": str(folder.parent), "hash": hash_file(folder / "tokenizer.json"), "summary": summary}


def transform(job: Job, on_progress: Progress) -> dict[str, Any]:
    """Cut all sequences into tokens and write the processed h5ad; where asked for, those of the other strand too."""
    run, obs, rows = _obs(job)
    cleaned, settings = _cleaned(job), run.data_module.sequences
    tokenizer = SequenceTokenizer(job.staging / "tokenizers" / FIELD, settings.upper_case)
    obs[read_json(job.staging / "split.json")["column"]] = read_split(job.staging).to_numpy()
    file, unknown = job.staging / "processed.h5ad", 0
    scratch = job.run_dir / "source"
    kinds = ["tokens", *(["other_strand"] if settings.reverse_complement else [])]
    dtype = np.uint16 if len(tokenizer.vocabulary) <= 65536 else np.uint32
    lengths: dict[str, list[np.ndarray]] = {kind: [] for kind in kinds}
    with SequenceWriter(file, obs) as writer:
        writer.array("letters", int(cleaned.lengths.sum()), np.uint8)
        for kind in kinds:  # how many pieces there are is known once all are cut
            with open(scratch / kind, "wb") as spool:
                for start in range(0, len(rows), BLOCK):
                    letters, starts = cleaned.of_rows(rows[start : start + BLOCK])
                    if kind == "tokens":
                        writer.append("letters", letters, np.diff(starts))
                    else:
                        letters = reverse_complement(letters, starts)
                    ids, counts = tokenizer.encode(letters, starts)
                    unknown += int(np.count_nonzero(ids == 0)) if kind == "tokens" else 0
                    spool.write(ids.astype(dtype).tobytes())
                    lengths[kind].append(counts)
                    on_progress({"kind": "rows", "done": min(start + BLOCK, len(rows)), "of": len(rows)})
            counts = np.concatenate(lengths[kind])
            writer.array(kind, int(counts.sum()), dtype)
            spooled = np.memmap(scratch / kind, dtype=dtype, mode="r") if counts.sum() else np.zeros(0, dtype)
            writer.append(kind, spooled, counts)
            del spooled
            (scratch / kind).unlink()
    pieces = np.concatenate(lengths["tokens"])
    room = run.data_module.evaluation_length - 2
    too_long = int((pieces > room).sum())
    if too_long:
        logger.warning(
            "%d of %d sequences have more than %d pieces and are cut there (data_module.max_length %d)",
            too_long, len(pieces), room, room + 2,
        )  # fmt: skip
    if unknown:
        logger.warning("%d of %d pieces are unknown to the vocabulary", unknown, int(pieces.sum()))
    summary = {
        "sequences": len(rows),
        "pieces": int(pieces.sum()),
        "unknown_pieces": unknown,
        "longest": int(pieces.max()),
        "longer_than_the_model": too_long,
    }
    plain = {
        **summary,
        "check": step_result(job, "check")["summary"],
        "split": step_result(job, "split")["summary"],
        "labels": read_json(job.staging / "labels.json"),
        "vocabulary": read_json(job.staging / "vocabulary.json"),
    }
    if (job.staging / "leakage.json").exists():
        plain["leakage"] = read_json(job.staging / "leakage.json")
    write_json_atomic(job.staging / "report.json", plain)
    write_json_atomic(job.staging / "transforms.json", [])  # of genes; how sequences are read goes with the config
    return {
        "uri": str(file),
        "hash": hash_file(file),
        "summary": summary,
        "table": [{"what": k, "found": v} for k, v in summary.items()],
    }
