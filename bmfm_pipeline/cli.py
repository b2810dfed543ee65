"""`bmfm`, and the command line of bmfm_targets. Everything heavy is imported by the command that needs it."""

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence

from bmfm_pipeline import __version__
from bmfm_pipeline.errors import PipelineError, Preempted

EXIT_USER_ERROR = 2
EXIT_PREEMPTED = 75
TAKE_OVERRIDES = (
    "benchmark",
    "run",
    "plan",
    "preprocess",
    "pretrain",
    "finetune",
    "evaluate",
    "predict",
    "interpret",
    "promote",
    "reevaluate",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `bmfm`; returns the exit code: 0, 2 for an error a person can mend, 75 when stopped and resumable."""
    parser = _parser()
    known, rest = parser.parse_known_args(arguments)
    if known.command is None:
        parser.print_help()
        return 0
    if known.command == "genes":  # names may stand after options
        known.names += [word for word in rest if not word.startswith("-")]
        rest = [word for word in rest if word.startswith("-")]
    known.overrides = _overrides(parser, rest)
    if known.overrides and known.command not in TAKE_OVERRIDES:
        parser.error(f"{known.command} takes no overrides: {' '.join(known.overrides)}")
    if getattr(known, "target", None) and ("=" in known.target or known.target.startswith("~")):
        known.overrides.insert(0, known.target)  # an override stood where the target would
        known.target = None
    return _guarded(known)


def seed_main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `bmfm-targets-scbert` and `bmfm-targets-run`: -cn NAME -cd DIR and overrides, as with Hydra."""
    parser = argparse.ArgumentParser(
        prog="bmfm-targets-scbert",
        description="Train, test or predict as a bmfm_targets config says (see `bmfm --help` for more).",
    )
    _config_options(parser)
    _common_options(parser)
    known, rest = parser.parse_known_args(arguments)
    if not known.config_name:
        parser.error("name a config with -cn, e.g. -cn pre_train_config -cd run")
    known.overrides, known.command = _overrides(parser, rest), "seed"
    return _guarded(known)


def _overrides(parser: argparse.ArgumentParser, words: Sequence[str]) -> list[str]:
    """The Hydra overrides among words that are no option: key=value, +key=value, ++key=value, ~key."""
    strangers = [word for word in words if word.startswith("-") or not ("=" in word or word.startswith("~"))]
    if strangers:
        parser.error(f"unrecognized arguments: {' '.join(strangers)} (overrides look like key=value)")
    return list(words)


def _guarded(known: argparse.Namespace) -> int:
    from bmfm_pipeline.tracking.redaction import RedactedLines, redact_text

    terminal = logging.StreamHandler(sys.stderr)
    terminal.setFormatter(RedactedLines("%(message)s"))
    logging.basicConfig(level=logging.INFO if known.verbose else logging.WARNING, handlers=[terminal])
    logging.getLogger("bmfm_pipeline").setLevel(logging.INFO)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads slow everything on a machine with other work
    if known.workspace:
        os.environ["BMFM_WORKSPACE"] = known.workspace
    from bmfm_pipeline import commands

    try:
        result = commands.find(known.command)(known)
    except PipelineError as error:
        said = redact_text(str(error))
        print(f"error: {said}", file=sys.stderr)
        if known.json:
            print(json.dumps({"error": said, "kind": type(error).__name__}))
        return EXIT_PREEMPTED if isinstance(error, Preempted) else EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on where it stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output left, e.g. `bmfm plan | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    if known.json:
        print(json.dumps(result if result is not None else {}))
    return getattr(result, "exit_code", 0)


def _common_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workspace", metavar="URI", help="where artefacts lie: a folder or s3://bucket/prefix (default ./workspace)"
    )
    parser.add_argument("--json", action="store_true", help="last line of stdout is one JSON object")
    parser.add_argument("--verbose", action="store_true", help="more lines on stderr")


def _config_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-cn", "--config-name", help="name of the config, without .yaml")
    parser.add_argument("-cd", "--config-dir", help="folder searched before the packaged configs")
    parser.add_argument("--cfg", choices=["job"], help="print the composed config and stop")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bmfm", description="Pretrain, fine-tune and honestly evaluate foundation models on single-cell data."
    )
    parser.add_argument("--version", action="version", version=f"bmfm {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    def add(name: str, text: str, config: bool = False) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        _common_options(command)
        if config:
            _config_options(command)
        return command

    run = add("run", "the whole chain on a dataset: preprocess, pretrain, fine-tune, evaluate")
    run.add_argument(
        "target",
        metavar="TARGET",
        help="a name of `bmfm datasets`, an h5ad file, or a folder of them (then also label=COLUMN)",
    )
    plan = add("plan", "what `bmfm run` would do, and why")
    plan.add_argument("target", metavar="TARGET")
    for stage, text in (
        ("preprocess", "check, split and transform data into an artefact"),
        ("pretrain", "pretrain a model on preprocessed data (made when absent)"),
        ("finetune", "fine-tune a model; model.checkpoint=PATH|latest, or null for from scratch"),
        ("evaluate", "test a fine-tuned model with intervals and controls; task.checkpoint=PATH"),
        ("interpret", "which genes a model's predictions come from, by class; task.checkpoint=PATH"),
    ):
        command = add(stage, text, config=True)
        command.add_argument(
            "target",
            nargs="?",
            metavar="TARGET",
            help="a dataset name, an h5ad file or a folder of them (optional with -cn)",
        )
        if stage == "evaluate":
            command.add_argument(
                "--write-label-mapping", metavar="FILE",
                help="write the labels of TARGET beside the model's classes as a csv file to fill in, and stop",
            )  # fmt: skip
    predict = add("predict", "labels, probabilities and embeddings for the cells of an h5ad file, or for sequences")
    predict.add_argument(
        "--model", required=True, metavar="URI",
        help="a fine-tuned model: artefact, folder, .ckpt file, repository of the Hugging Face hub (org/name), or 'latest'",
    )  # fmt: skip
    predict.add_argument(
        "--input", required=True, metavar="FILE",
        help="an h5ad file, or for a model of sequences a table, a folder or FASTA; labels are not needed",
    )  # fmt: skip
    predict.add_argument(
        "--output",
        required=True,
        metavar="DIR",
        help="folder (or s3://bucket/prefix) for predictions, probabilities, logits and embeddings",
    )
    predict.add_argument("--layer", metavar="NAME", help="layer of the file that holds counts, or 'raw' (default X)")
    predict.add_argument("--batch-size", type=int, metavar="N", help="cells in a batch (default: as in training)")
    predict.add_argument("--format", choices=["csv", "parquet"], default="csv", help="of the tables (default csv)")
    predict.add_argument(
        "--h5ad", nargs="?", const="predicted.h5ad", metavar="NAME",
        help="also write a copy of the input with predictions in obs and embeddings in obsm (default name predicted.h5ad)",
    )  # fmt: skip
    predict.add_argument(
        "--pooling", action="append", default=[], metavar="HOW",
        help="how embeddings are taken: first_token, pooling_layer, mean_pooling, a position, or several joined with +; may be repeated "
        "(default: as in training)",
    )  # fmt: skip
    predict.add_argument("--umap", action="store_true", help="two coordinates per cell, from the first pooling")
    predict.add_argument(
        "--batch-column", metavar="COLUMN", help="obs column of the input: score how well embeddings mix its values"
    )
    predict.add_argument(
        "--perturb", action="append", default=[], metavar="GENE=EXPRESSION",
        help="what a change of a gene's expression does to the cells: GENE=0, 'GENE=MAX * 0.5', GENE1=0,GENE2=0 for both at once; a model of "
        "perturbations also takes a bare GENE; may be repeated",
    )  # fmt: skip
    predict.add_argument(
        "--variants", metavar="FILE",
        help="a VCF file: what each variant does to the answers of a model of sequences; --input is the genome as FASTA",
    )  # fmt: skip
    predict.add_argument(
        "--window", type=int, metavar="N",
        help="letters that are read around a variant (default: as many as a training sequence of the model has)",
    )  # fmt: skip
    predict.add_argument(
        "--windows", action="store_true",
        help="read sequences that are longer than the model reads in overlapping windows and average the answers (default: cut them)",
    )  # fmt: skip
    predict.add_argument(
        "--mutagenesis", action="store_true",
        help="what every change of a base does to the answers of a model of sequences",
    )  # fmt: skip
    predict.add_argument(
        "--limit", type=int, metavar="N", help="of --mutagenesis: the first N sequences of the input (default 20)"
    )
    predict.add_argument(
        "--one-strand", action="store_true", help="read sequences as they are given, not also their reverse complement"
    )
    predict.add_argument(
        "--unknown-below", metavar="X",
        help="cells whose confidence is less are called unknown: a number, or 'auto' for the threshold that the model carries",
    )  # fmt: skip
    benchmark = add("benchmark", "every dataset of a suite with every model and seed, and one table")
    benchmark.add_argument(
        "suite", nargs="?", metavar="SUITE",
        help="a name, or the YAML file of a suite; without it the known ones are listed. Then seeds=5, datasets=..., models=..., controls=..., "
        "parallel=N, fan_out=dask and overrides for all",
    )  # fmt: skip
    benchmark.add_argument("--plan", action="store_true", help="show what would run, and why, and stop")
    compare = add(
        "compare", "two evaluations side by side: paired where their test cells are the same, unpaired otherwise"
    )
    for side, metavar in (("a", "RUN_A"), ("b", "RUN_B")):
        compare.add_argument(
            side, metavar=metavar,
            help="an evaluation, a model (its newest evaluation), a dataset of the workspace, 'latest' or 'previous'",
        )  # fmt: skip
    compare.add_argument(
        "--output", metavar="FOLDER", help="also write comparison.json, comparison.md and comparison.html"
    )
    compare.add_argument("--level", type=float, default=0.95, metavar="SHARE", help="of the intervals (default 0.95)")
    compare.add_argument("--resamples", type=int, default=10_000, metavar="N", help="of the test cells (default 10000)")
    compare.add_argument("--seed", type=int, default=0, metavar="N", help="of the resamples (default 0)")
    again = add("reevaluate", "test the champion of a dataset on the data as they are now, and a challenger beside it")
    again.add_argument(
        "target", nargs="?", metavar="TARGET", help="a dataset name, or the h5ad file the model is about"
    )
    again.add_argument(
        "--data", metavar="FILE", help="test on these cells instead: an h5ad file, a folder of them, or a dataset"
    )
    promote = add("promote", "register a model as challenger; it becomes champion where the evidence allows it")
    promote.add_argument(
        "target", nargs="?", metavar="TARGET", help="a dataset name, or the h5ad file the model is about"
    )
    promote.add_argument(
        "--model", default="latest", metavar="URI",
        help="a fine-tuned model artefact (default: the newest of the dataset in this workspace)",
    )  # fmt: skip
    export = add("export", "a model as a folder to share: weights, vocabulary, classes, and a card with its numbers")
    export.add_argument("--model", required=True, metavar="URI", help="a model artefact")
    export.add_argument("--output", required=True, metavar="DIR", help="a folder that is not there yet")
    export.add_argument(
        "--evaluation", metavar="URI", help="the test whose numbers the card shows (default: the newest of this model)"
    )
    export.add_argument("--license", metavar="NAME", help="the licence that the card names, such as apache-2.0")
    export.add_argument("--name", help="what the card calls the model")
    data = add("data", "look into a data file: `bmfm data inspect FILE`")
    data.add_argument("what", choices=["inspect"])
    data.add_argument(
        "file", metavar="FILE", help="an h5ad file, local or s3://..., or the folder of a preprocess artefact"
    )
    data.add_argument("--layer", metavar="NAME", help="look at this layer, or 'raw' (default X)")
    data.add_argument("--quick", action="store_true", help="leave out the pass over all cells")
    catalogue = add(
        "datasets", "list the catalogue, show one dataset, or download one: `bmfm datasets [show|download NAME]`"
    )
    catalogue.add_argument("action", nargs="?", choices=["list", "show", "download"])
    catalogue.add_argument("name", nargs="?", metavar="NAME")
    catalogue.add_argument(
        "--to", metavar="FOLDER", help="download: where the data goes (default: where it is looked for)"
    )
    catalogue.add_argument(
        "--url",
        action="append",
        metavar="FILE=URL",
        help="download: take this file from a mirror, e.g. matrix=https://...",
    )
    catalogue.add_argument(
        "--sha256", action="append", metavar="FILE=SUM", help="download: the sum that this file must have"
    )
    names = add("genes", "the table of gene names: `bmfm genes download`, `bmfm genes show NAME...`")
    names.add_argument("what", choices=["download", "show"])
    names.add_argument("names", nargs="*", metavar="NAME", help="show: symbols, older symbols, aliases or Ensembl ids")
    names.add_argument("--table", metavar="FILE", help="show: this table (default: the downloaded one)")
    names.add_argument("--url", help="download: another address of the complete set of HGNC")
    names.add_argument("--sha256", metavar="SUM", help="download: the sum that the file must have")
    deploy = add("deploy", "register pools, limits, deployments, schedules and automations on a Prefect server")
    deploy.add_argument(
        "names", nargs="*", metavar="NAME", help="only these datasets or suites; nothing is removed then (default: all)"
    )
    deploy.add_argument("--dry-run", action="store_true", help="show what would change, and change nothing")
    deploy.add_argument(
        "--gpus", type=int, metavar="N", help="runs that may use a model at once, on all workers together (at first 1)"
    )
    deploy.add_argument(
        "--pool", action="append", default=[], metavar="NAME=TYPE",
        help="type of a pool that is not there yet: process (default), docker or kubernetes; may be repeated",
    )  # fmt: skip
    deploy.add_argument("--reset", action="store_true", help="also overwrite what was switched on the server's pages")
    deploy.add_argument("--keep", action="store_true", help="leave what is gone from the catalogue")
    add(
        "doctor", "check versions, machine, workspace, MLflow and Prefect; says how to mend what is wrong (exit code 1)"
    )
    interface = add("ui", "open the Prefect and MLflow pages on this machine (Ctrl-C stops both)")
    interface.add_argument("--prefect-port", type=int, default=4200)
    interface.add_argument("--mlflow-port", type=int, default=5000)
    _workspace_options(commands)
    return parser


def _workspace_options(commands) -> None:
    text = "what a workspace holds, whether it is whole, and what may go: `bmfm workspace ls|verify|gc`"
    parser = commands.add_parser("workspace", help=text, description=text)
    what = parser.add_subparsers(dest="what", metavar="ls|verify|gc", required=True)

    def add(name: str, text: str) -> argparse.ArgumentParser:
        command = what.add_parser(name, help=text, description=text)
        _common_options(command)
        return command

    add("ls", "artefacts with size, age and what was made from what; run folders and copies").add_argument(
        "--all", action="store_true", help="every artefact of a stage that has many"
    )
    verify = add("verify", "compare every file with the sha256 of its manifest, and find what was left behind")
    verify.add_argument("--quick", action="store_true", help="compare sizes only, and versions where s3 tells them")
    verify.add_argument(
        "--repair", action="store_true", help="set damaged artefacts aside: the next run makes them again"
    )
    collect = add("gc", "delete what nothing needs: old artefacts, scratch of finished runs, unused copies")
    collect.add_argument("--older-than", default="30d", metavar="AGE", help="such as 30d (the default), 12h or 2w")
    collect.add_argument("--dry-run", action="store_true", help="show what would go and why the rest stays")
    collect.add_argument(
        "--even-latest",
        action="store_true",
        help="also the newest model of a dataset, when it is as old and nothing points to it",
    )
    collect.add_argument(
        "--without-registry", action="store_true", help="delete models although MLflow cannot be asked"
    )
    collect.add_argument(
        "--without-deployments", action="store_true", help="delete models although the Prefect server cannot be asked"
    )


if __name__ == "__main__":
    sys.exit(main())
