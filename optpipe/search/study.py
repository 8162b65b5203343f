"""The loop of a search: ask Optuna for trials, let a launcher run them as jobs, tell Optuna what they measured."""

from __future__ import annotations

import itertools
import random
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optpipe.errors import RecipeError, named_reason
from optpipe.progress import say
from optpipe.report.schema import NotMeasured, Report
from optpipe.search import Sampler, Settings, weighed
from optpipe.search.objectives import constraints, figures, miss
from optpipe.search.space import Choice, Space
from optpipe.sweep import ENDED, Job, Ledger, State

if TYPE_CHECKING:
    from optuna import Study
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial, Trial

FILE = "study.db"
REPEATS = 30  # trials that the sampler may repeat before one that nobody tried is drawn
MOST_TO_LIST = 10_000  # combinations of a space that is searched for one that nobody tried
Launch = Callable[[Sequence[Sequence[str]], int], Any]  # overrides of jobs, and the number of the first


class Search:
    """The search in `folder`, of which a part may have been done by an earlier process.

    launch: runs jobs, and returns when they are over; their ledger and reports say what came of them.
    at_once: jobs that it runs side by side.
    prunes: whether a job ends after the first step that breaks the budget.
    """

    def __init__(
        self, settings: Settings, space: Space, folder: Path, launch: Launch, at_once: int = 1, *, prunes: bool = False
    ) -> None:
        self.settings, self.space, self.launch, self.at_once = settings, space, launch, at_once
        self.always = ["budget.policy=stop"] if prunes else []
        self.folder, self.ledger = folder, Ledger(folder)
        self.distributions = {found.key: found.distribution() for found in space.dimensions}

    def run(self) -> None:
        """Until as many trials are over as were asked for, the goal is met, or nothing is left to try.

        Raises RecipeError if the storage cannot be used, or searches in other folders left nothing to do.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Optuna's, on what it calls experimental
            study = self._study()
            self._refuse_if_over(study)
            self.ledger.plan(self.settings.trials)
            ended = self._run_jobs(study, self._interrupted(study))
            while ended and (left := self.settings.trials - len(over(study))) > 0 and not self._is_met(study):
                batch = self._ask(study, min(left, self.at_once))
                if not batch:
                    say(f"every combination of the space was tried, {len(over(study))}")
                    break
                ended = self._run_jobs(study, batch)
        if ended:
            self.ledger.plan(sum(job.state is not State.waiting for job in self.ledger.jobs()))

    def _study(self) -> Study:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        uri = self.settings.storage or f"sqlite:///{self.folder / FILE}"
        name = self.settings.study or self.folder.name
        try:
            study = optuna.create_study(
                storage=uri, study_name=name, load_if_exists=True, directions=["minimize"] * self._objectives
            )
        except Exception as error:  # of whatever database
            raise RecipeError([f"the study '{name}' cannot be kept: {named_reason(error)}"], "search") from error
        if len(study.directions) != self._objectives:
            said = f"the study '{name}' has {len(study.directions)} objectives; name another with hydra.sweeper.study=…"
            raise RecipeError([said], "search")
        study.sampler = self._sampler(len(study.trials))
        if not study.trials:
            for settings in self.settings.first:
                study.enqueue_trial(dict(settings), user_attrs={"given": True})
        return study

    def _refuse_if_over(self, study: Study) -> None:
        """The answer would be that of no job: those that this folder has none of lie elsewhere."""
        known = over(study)
        if self.ledger.jobs() or not (len(known) >= self.settings.trials or self._is_met(study)):
            return
        folders = ", ".join(sorted({str(trial.user_attrs["folder"]) for trial in known}))
        raise RecipeError(
            [
                f"the study '{study.study_name}' is over: {len(known)} trials, in {folders}; raise "
                "hydra.sweeper.trials, or name another with hydra.sweeper.study=…"
            ],
            "search",
        )

    @property
    def _objectives(self) -> int:
        return 1 if self.settings.weights else len(self.settings.objectives)

    def _sampler(self, begun: int) -> BaseSampler:
        """begun: the trials that there are, so that a search that goes on does not draw the same again."""
        from optuna import samplers

        seed, trials = self.settings.seed * 100_003 + begun, self.settings.trials
        startup = max(4, min(10, trials // 3))
        match self.settings.sampler:
            case Sampler.tpe:
                return samplers.TPESampler(seed=seed, n_startup_trials=startup)
            case Sampler.nsga2:
                return samplers.NSGAIISampler(seed=seed, population_size=max(4, min(50, trials // 5)))
            case Sampler.gp:
                return samplers.GPSampler(seed=seed, n_startup_trials=startup)
            case Sampler.random:
                return samplers.RandomSampler(seed=seed)

    def _interrupted(self, study: Study) -> list[Trial]:
        """The trials of this folder that a process began and did not end."""
        from optuna.trial import Trial, TrialState

        running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        return [Trial(study, trial._trial_id) for trial in running if self._job_of(trial) is not None]

    def _ask(self, study: Study, count: int) -> list[Trial]:
        """New trials, none of them a repetition; none if nothing is left to try."""
        batch: list[Trial] = []
        for _ in range(count):
            trial = self._new(study)
            if trial is None:
                break
            number = 1 + max((job for known in study.trials if (job := self._job_of(known)) is not None), default=-1)
            trial.set_user_attr("job", number)
            trial.set_user_attr("folder", str(self.folder))
            batch.append(trial)
        return batch

    def _job_of(self, trial: FrozenTrial) -> int | None:
        mine = trial.user_attrs.get("folder") == str(self.folder)
        return trial.user_attrs["job"] if mine else None

    def _new(self, study: Study) -> Trial | None:
        from optuna.trial import TrialState

        tried = {self._words(trial.params) for trial in study.trials if trial.params and "folder" in trial.user_attrs}
        if len(tried) >= self.space.size:
            return None
        for attempt in itertools.count():
            if attempt == REPEATS and (left := self._untried(tried)):
                study.enqueue_trial(left)
            trial = study.ask(self.distributions)
            if self._words(trial.params) not in tried:
                return trial
            study.tell(trial, state=TrialState.FAIL)
        return None

    def _words(self, params: dict[str, Any]) -> tuple[str, ...]:
        return tuple(self.space.overrides(params)) if params.keys() == self.distributions.keys() else ()

    def _untried(self, tried: set[tuple[str, ...]]) -> dict[str, Any] | None:
        """A combination that nobody tried; None where they are too many to list."""
        if self.space.size > MOST_TO_LIST:
            return None
        lists = [self._values(key) for key in self.distributions]
        every = (dict(zip(self.distributions, values, strict=True)) for values in itertools.product(*lists))
        left = [params for params in every if self._words(params) not in tried]
        return random.Random(self.settings.seed + len(tried)).choice(left) if left else None

    def _values(self, key: str) -> list[Any]:
        dimension = next(found for found in self.space.dimensions if found.key == key)
        if isinstance(dimension, Choice):
            return list(dimension.values)
        step = dimension.step or 1
        count = round((dimension.high - dimension.low) / step) + 1
        return [dimension.low + i * step for i in range(count)]

    def _run_jobs(self, study: Study, trials: Sequence[Trial]) -> bool:
        """Launch the jobs of `trials`, those with neighbouring numbers together, and tell what came of them.

        False if one did not end, interrupted or lost by its launcher: the same command goes on with it.
        """
        numbered = [(int(trial.user_attrs["job"]), trial) for trial in trials]
        for _, group in itertools.groupby(enumerate(numbered), lambda pair: pair[1][0] - pair[0]):
            chunk = [pair for _, pair in group]
            jobs = [[*self.space.overrides(trial.params), *self.always] for _, trial in chunk]
            self.launch(jobs, chunk[0][0])
            told = [(trial, self.ledger.job(number)) for number, trial in chunk]
            for trial, job in told:
                if job.state in ENDED:
                    self._tell(study, trial, job)
            if any(job.state not in ENDED for _, job in told):
                return False
        return True

    def _tell(self, study: Study, trial: Trial, job: Job) -> None:
        from optuna.trial import TrialState

        report = read(job)
        if report is not None:
            for name, missed in constraints(report).items():
                trial.set_constraint(name, missed)
            trial.set_user_attr("miss", miss(report))
        if job.state is State.stopped:
            study.tell(trial, state=TrialState.PRUNED)
            return
        values = self._values_of(report) if report else NotMeasured(job.reason or f"job {job.number} left no report")
        if job.state is not State.done or isinstance(values, NotMeasured):
            reason = values.not_measured if isinstance(values, NotMeasured) else job.reason
            trial.set_user_attr("reason", reason)
            study.tell(trial, state=TrialState.FAIL)
            if job.state is State.done:
                say(f"job {job.number} cannot be judged: {reason}")
            return
        study.tell(trial, values)

    def _values_of(self, report: Report) -> list[float] | NotMeasured:
        names = list(self.settings.weights) or self.settings.objectives
        found = figures(report, names)
        if isinstance(found, NotMeasured):
            return found
        return [weighed(self.settings.weights, found)] if self.settings.weights else list(found.values())

    def _is_met(self, study: Study) -> bool:
        if not self.settings.is_for_goal:
            return False
        return any(trial.values and trial.values[0] <= 0 for trial in over(study))


def over(study: Study) -> list[FrozenTrial]:
    """The trials that are over, repetitions not counted."""
    return [trial for trial in study.trials if trial.state.is_finished() and "folder" in trial.user_attrs]


def read(job: Job) -> Report | None:
    """What the job reported; None if it did not come so far."""
    try:
        return Report.read(Path(job.folder))
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def nearest(ledger: Ledger) -> tuple[Job, Report] | None:
    """Of the jobs that came to their end the one whose limits are missed least; of equals the fastest."""
    found = [(job, report) for job in ledger.jobs() if job.state is State.done and (report := read(job))]
    ranked = [(miss(report), _time(report), job.number, job, report) for job, report in found]
    if not ranked:
        return None
    *_, job, report = min(ranked, key=lambda entry: entry[:3])
    return job, report


def _time(report: Report) -> float:
    found = figures(report, ["latency"])
    return float("inf") if isinstance(found, NotMeasured) else found["latency"]
