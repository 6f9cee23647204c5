"""Workers that take tasks, vary, die and come back: a discrete-event simulation of a sweep's stages."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, slots=True)
class Stage:
    """Tasks between two barriers.

    Args:
        name: What is done.
        task_s: Seconds of each task on an undisturbed worker.
        workers: How many take them.
        on_slots: Whether the workers are GPU slots, which vary and die; the driver's own do neither.
    """

    name: str
    task_s: tuple[float, ...]
    workers: int
    on_slots: bool = False

    @property
    def work_s(self) -> float:
        """Of all tasks, one after another."""
        return sum(self.task_s)

    @property
    def undisturbed_s(self) -> float:
        """Time of the stage without variation and failures, when all tasks are equal."""
        return math.ceil(len(self.task_s) / self.workers) * max(self.task_s, default=0.0)


@dataclass(frozen=True, slots=True)
class Faults:
    """What goes wrong.

    Args:
        cv: Standard deviation of a task's time over its mean; times are lognormal.
        mtbf_s: Mean time between failures of one slot.
        reload_s: From a failure until the slot's pair is in memory again.
    """

    cv: float = 0.0
    mtbf_s: float = math.inf
    reload_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What happened.

    Args:
        stage_s: Time from barrier to barrier, by stage.
        done: Tasks finished, by stage.
        lost: Tasks that a failure took and that were done again.
        failures: Of slots, while stages that need them ran.
        slot_busy_s: Of tasks that finished on slots.
        slot_lost_s: Of tasks that did not.
    """

    stage_s: dict[str, float]
    done: dict[str, int]
    lost: int
    failures: int
    slot_busy_s: float
    slot_lost_s: float

    @property
    def makespan_s(self) -> float:
        """Of the whole."""
        return sum(self.stage_s.values())


@dataclass
class _Fleet:
    """Slots with the times of their next failures, over all stages of a simulation."""

    faults: Faults
    random: np.random.Generator
    next_failure: dict[int, float] = field(default_factory=dict)
    failures: int = 0
    lost: int = 0
    busy_s: float = 0.0
    lost_s: float = 0.0

    def varied(self, seconds: float) -> float:
        if self.faults.cv == 0:
            return seconds
        sigma = math.sqrt(math.log1p(self.faults.cv**2))
        return seconds * float(self.random.lognormal(-(sigma**2) / 2, sigma))

    def failure_of(self, slot: int) -> float:
        if slot not in self.next_failure:
            self.next_failure[slot] = self._until_next()
        return self.next_failure[slot]

    def revive(self, slot: int) -> float:
        """The slot fails at its time; when it is back."""
        self.failures += 1
        back = self.failure_of(slot) + self.faults.reload_s
        self.next_failure[slot] = back + self._until_next()
        return back

    def _until_next(self) -> float:
        mtbf = self.faults.mtbf_s
        return math.inf if mtbf == math.inf else float(self.random.exponential(mtbf))


def simulate(stages: Sequence[Stage], faults: Faults = Faults(), seed: int = 0) -> Outcome:
    """Run the stages one after another; a stage begins when the one before has its last result.

    Raises:
        ValueError: A task is so long that slots hardly ever live through it.
    """
    longest = max((max(s.task_s, default=0.0) for s in stages if s.on_slots), default=0.0)
    if longest > 5 * faults.mtbf_s:
        raise ValueError(
            f"A task of {longest:.0f} s hardly ends on slots that fail every {faults.mtbf_s:.0f} s; "
            "make shards smaller."
        )
    fleet = _Fleet(faults, np.random.default_rng(seed))
    now, stage_s, done = 0.0, {}, {}
    for stage in stages:
        end, done[stage.name] = _run(stage, now, fleet)
        stage_s[stage.name] = end - now
        now = end
    return Outcome(stage_s, done, fleet.lost, fleet.failures, fleet.busy_s, fleet.lost_s)


def _run(stage: Stage, start: float, fleet: _Fleet) -> tuple[float, int]:
    """When the last task is done, and how many were."""
    tasks = [(start, i, fleet.varied(s) if stage.on_slots else s) for i, s in enumerate(stage.task_s)]
    heapq.heapify(tasks)
    free = [(start, worker) for worker in range(stage.workers)]
    end, done = start, 0
    while tasks:
        now, worker = heapq.heappop(free)
        if tasks[0][0] > now:  # all that is left was lost by somebody later than now
            heapq.heappush(free, (tasks[0][0], worker))
            continue
        if stage.on_slots and fleet.failure_of(worker) <= now:
            heapq.heappush(free, (max(now, fleet.revive(worker)), worker))
            continue
        _, i, seconds = heapq.heappop(tasks)
        finished = now + seconds
        if stage.on_slots and (failed := fleet.failure_of(worker)) < finished:
            fleet.lost += 1
            fleet.lost_s += failed - now
            heapq.heappush(tasks, (failed, i, seconds))
            heapq.heappush(free, (fleet.revive(worker), worker))
            continue
        if stage.on_slots:
            fleet.busy_s += seconds
        done += 1
        end = max(end, finished)
        heapq.heappush(free, (finished, worker))
    return end, done
