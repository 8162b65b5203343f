"""Judge: what a model between two steps is worth under the run's budget."""

from __future__ import annotations

from dataclasses import replace

from optpipe.budget import AT_LEAST, Budget, Estimate, estimates, judge
from optpipe.contest import Entrant
from optpipe.measure import quality
from optpipe.measure.measurer import Measurer
from optpipe.report import Check, Measurement
from optpipe.state import State


class Judge:
    """Judges states by what the measurer says of them, against the run's baseline.

    baseline: its state's hash and measurement, known once it was measured.
    """

    def __init__(self, budget: Budget, measurer: Measurer) -> None:
        self.budget, self.measurer = budget, measurer
        self.baseline: tuple[str, Measurement] | None = None

    @property
    def margin(self) -> float:
        """Within which two figures are the same."""
        return self.measurer.settings.margin

    def checks(self, limits: dict[str, float], state: State, where: str) -> list[Check]:
        """Each of `limits` on `state`, which came out of the entry `where`."""
        if not limits:
            return []
        assert self.baseline is not None
        known = estimates(state.measurement, self.baseline[1])
        if "quality_drop" in limits:
            known["quality_drop"] = self.drop(state)
        return judge(limits, known, self.budget.confidence, where)

    def drop(self, state: State) -> Estimate:
        """The quality that `state` lost on validation samples; none without doubt if nothing has changed."""
        assert self.baseline is not None
        points = self.measurer.task.metric.unit == "fraction"
        unit, scale = (" points on validation", 100.0) if points else (" on validation", 1.0)
        if state.artifact.hash == self.baseline[0] and not state.engine:
            return replace(Estimate.exact(0.0), unit=unit, scale=scale)
        ours, theirs = self.measurer.validation(state.artifact, state.engine), self.measurer.validation_baseline
        return Estimate(
            ours.drop_from(theirs),
            quality.drop_interval(ours, theirs),
            lambda confidence: quality.drop_bound(ours, theirs, confidence),
            unit,
            scale,
        )

    def entrant(self, key: str, state: State) -> Entrant:
        """`state`, which came out of an alternative of the entry `key`, with the limits that it breaks.

        Those are all of the run's, and those on the entry.
        """
        limits = self.budget.limits()
        for name, allowed in self.budget.of_step(key).items():
            stricter = max if name in AT_LEAST else min
            limits[name] = stricter(allowed, limits.get(name, allowed))
        broken = {check.limit: check.said for check in self.checks(limits, state, key) if not check.holds}
        metric, drop = self.measurer.task.metric, self.drop(state)
        return Entrant(measurement=state.measurement, metric=metric, drop=drop, broken=broken)
