"""Points of a study: the chain once per share of the training cells and per seed, with everything else the same."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from bmfm_pipeline.config.splits import resolve_split
from bmfm_pipeline.errors import ConfigError
from bmfm_pipeline.stages.jobs import STAGES, Job, make_job
from bmfm_pipeline.stages.planning import compose_stage, plan_pipeline, stage_overrides
from bmfm_pipeline.storage import Workspace

PERCENT = (10, 25, 50, 75, 100)
SEEDS_OF = ("finetuning", "training", "split")
FRACTION, RANDOM_STATE = "data_module.train_fraction", "data_module.transform_kwargs.random_state"
OFF = (None, False, "false", "False")


@dataclass(frozen=True)
class Point:
    """One model and its test: the share of the training cells (0..1], the seed, the overrides that say so, and the jobs in order."""

    fraction: float
    seed: int
    overrides: tuple[str, ...]
    jobs: tuple[Job, ...]

    @property
    def name(self) -> str:
        return f"{100 * self.fraction:g} %, seed {self.seed}"

    @property
    def evaluation(self) -> Job:
        return self.jobs[-1]


@dataclass(frozen=True)
class StudyPlan:
    """The points of a study, each planned whole. `seeds_of` says what a seed changes: finetuning, training or split."""

    points: tuple[Point, ...]
    seeds_of: str = "finetuning"
    uses: dict[str, int] = field(default_factory=dict)  # key of a job: points that need it

    @property
    def name(self) -> str:
        return self.main.evaluation.name

    @property
    def place(self) -> Workspace:
        return self.main.evaluation.place

    @property
    def fractions(self) -> list[float]:
        return sorted({point.fraction for point in self.points})

    @property
    def seeds(self) -> list[int]:
        return list(dict.fromkeys(point.seed for point in self.points))

    @property
    def main(self) -> Point:
        """The point that stands for the chain: the largest share, the first seed."""
        return max(self.points, key=lambda point: point.fraction)

    @property
    def jobs(self) -> list[Job]:
        """Every job of every point, once."""
        return list({job.key: job for point in self.points for job in point.jobs}.values())

    @property
    def shared(self) -> list[Job]:
        """Jobs that more than one point needs, in the order they run."""
        order = {stage: number for number, stage in enumerate(STAGES)}
        return sorted((job for job in self.jobs if self.uses[job.key] > 1), key=lambda job: order[job.stage])

    def own(self, point: Point) -> list[Job]:
        return [job for job in point.jobs if self.uses[job.key] == 1]

    def study_job(self, done: Sequence[Point] | None = None) -> Job:
        """The job that puts the points together: those of `done` (default all); the others are named in its result as missing."""
        done = self.points if done is None else done
        inputs = {point.name: point.evaluation.as_input() for point in done}
        view = {
            "seeds_of": self.seeds_of,
            "points": [{"name": point.name, "fraction": point.fraction, "seed": point.seed} for point in done],
            "missing": [point.name for point in self.points if point not in done],
        }
        config = {**view, "seed": {"seed_value": self.main.seed}}
        job = make_job("study", self.name, self.place, config, view, inputs)
        if job.cached or job.reason.startswith("no study"):
            return job
        return replace(job, reason="the tests of its points are not those of an earlier study")


def plan_study(
    target: str,
    *,
    few_shot: Any = None,
    seeds: Any = None,
    seeds_of: str | None = None,
    label: str | None = None,
    overrides: Sequence[str] = (),
    workspace: str | None = None,
    controls: str | None = None,
) -> StudyPlan:
    """The chains behind a few-shot curve, a spread over seeds, or both.

    Parameters
    ----------
    few_shot : percentages of the training cells, or true for 10, 25, 50, 75 and 100.
    seeds : how many seeds (the run's own and those after it), or a list of them.
    seeds_of : what a seed changes. finetuning: order, masks and fresh heads of fine-tuning, from one pretrained model; training:
        pretraining too; split: the split as well, so that every seed has test cells of its own.

    The other arguments are those of plan_pipeline. Raises ConfigError when a value makes no sense or the cells have no labels.
    """
    fractions, what = read_percentages(few_shot), seeds_of or "finetuning"
    if what not in SEEDS_OF:
        raise ConfigError(f"seeds_of={what}: must be one of {', '.join(SEEDS_OF)}")
    asked = read_seeds(seeds)
    if seeds_of is not None and asked is None:
        raise ConfigError(f"seeds_of={what}: says what several seeds change; give them with seeds=5 or seeds=[1,2,3]")
    if fractions is None and asked is None:
        raise ConfigError("a study needs few_shot=true, or percentages, or seeds=N")
    set_too = [word for word in overrides if word.lstrip("+~").partition("=")[0].endswith(FRACTION)]
    if fractions is not None and set_too:
        raise ConfigError(f"few_shot varies {FRACTION}, which {set_too[0]} sets too; keep one of them")
    run = compose_stage("finetune", target, overrides=stage_overrides("finetune", overrides), label=label)
    if not run.label_columns and not run.predicts_pairs:
        raise ConfigError(
            "few_shot and seeds repeat fine-tuning, and these cells have no label column to learn; name one with label=COLUMN"
        )
    split = resolve_split(run)
    if what == "split" and split.method in ("column", "file", "reuse") and not split.dev_fraction:
        raise ConfigError(
            "seeds_of=split: the split is given, so a seed cannot change it; use seeds_of=finetuning or training"
        )
    own = run.seed.seed_value
    if asked is None or isinstance(asked, int):
        asked = tuple(own + number for number in range(asked or 1))
    state = run.data_module.transform_kwargs.random_state
    if fractions is None:
        fractions, by_share = (run.data_module.train_fraction or 1.0,), False
    else:
        by_share = True
    points = []
    for fraction in fractions:
        for seed in asked:
            words = seed_words(seed, what, own if state is None else state)
            if by_share and fraction < 1:
                words.append(f"finetune.{FRACTION}={fraction}")
            jobs = plan_pipeline(
                target, label=label, overrides=[*overrides, *words], workspace=workspace, controls=controls
            )
            points.append(Point(fraction, seed, tuple(words), tuple(jobs)))
    keys = [job.key for point in points for job in {job.key: job for job in point.jobs}.values()]
    return StudyPlan(tuple(points), what, {key: keys.count(key) for key in keys})


def seed_words(seed: int, what: str, state: int) -> list[str]:
    """Overrides that give a chain its seed, and keep the split of the others where the seed is not its own."""
    if what == "split":
        return [f"seed.seed_value={seed}", f"{RANDOM_STATE}={seed}"]
    key = "finetune.seed.seed_value" if what == "finetuning" else "seed.seed_value"
    return [f"{RANDOM_STATE}={state}", f"{key}={seed}"]


def read_percentages(value: Any) -> tuple[float, ...] | None:
    """Shares 0..1 of the training cells, ascending, from true, '10,25,50', '[10, 25]' or numbers; None from false or nothing."""
    if value in OFF:
        return None
    if value is True or value in ("true", "True"):
        numbers = list(PERCENT)
    else:
        numbers = [_number(word, f"few_shot={value}", float) for word in _words(value)]
    if not numbers or any(not 0 < number <= 100 for number in numbers):
        raise ConfigError(f"few_shot={value}: percentages lie above 0 and up to 100; write few_shot=[10,25,50,75,100]")
    if max(numbers) <= 1:
        raise ConfigError(
            f"few_shot={value}: is read as percent, so 1 is one cell in a hundred; write few_shot=[10,50]"
        )
    return tuple(sorted({round(number / 100, 9) for number in numbers}))


def read_seeds(value: Any) -> int | tuple[int, ...] | None:
    """A number of seeds, or the seeds themselves, from 5, '5', '[1,2,3]' or numbers; None from nothing."""
    if value in OFF or value == "":
        return None
    words = _words(value)
    numbers = [_number(word, f"seeds={value}", int) for word in words]
    listed = not isinstance(value, int) and (len(numbers) > 1 or not isinstance(value, str) or "[" in value)
    if listed:
        if not numbers or len(set(numbers)) < len(numbers) or min(numbers) < 0:
            raise ConfigError(f"seeds={value}: name each seed once, as whole numbers from 0: seeds=[1,2,3]")
        return tuple(numbers)
    if not numbers or numbers[0] < 2:
        raise ConfigError(
            f"seeds={value}: a spread needs 2 seeds or more; seeds=[{value}] would be one run with that seed"
        )
    return numbers[0]


def _words(value: Any) -> list[str]:
    if isinstance(value, str):
        return [
            word.strip().removesuffix("%").strip() for word in value.strip().strip("[]()").split(",") if word.strip()
        ]
    return [str(entry) for entry in (value if isinstance(value, list | tuple) else [value])]


def _number(word: str, said: str, kind: type) -> Any:
    try:
        return kind(word)
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise ConfigError(f"{said}: {word!r} is not {what}") from None
