"""Chunk by chunk, and less at a time when memory runs out."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from dataclasses import astuple, dataclass

import torch

from mechdiff_mlflow.engine.model.chunks import Chunk, ChunkPlan
from mechdiff_mlflow.errors import MechdiffError

_OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""What torch says where it raises no `OutOfMemoryError`: on the CPU, and in cuBLAS."""


@dataclass(frozen=True, slots=True)
class ChunkLimits:
    """How much an engine holds at a time; each is at least 1."""

    batch_size: int = 16  # prompts in one forward
    max_rows: int = 8192  # patched tokens that go up the layers together
    head_rows: int = 2048  # rows of logits in memory together

    def __str__(self) -> str:
        return (
            f"{self.batch_size} prompts, {self.max_rows} patched tokens and {self.head_rows} rows of logits"
        )

    def within(self, other: ChunkLimits) -> ChunkLimits:
        """The smaller of each."""
        return ChunkLimits(*map(min, astuple(self), astuple(other)))

    def less(self, n_prompts: int, *, patched: bool) -> ChunkLimits | None:
        """What to try after these failed on n prompts together; None when there is nothing smaller.

        Without patched tokens only the prompts are fewer.
        """
        if n_prompts == 1 and (not patched or self.max_rows == self.head_rows == 1):
            return None
        # One prompt alone: the rest is due to patched tokens, and each attempt costs a forward.
        part = (2 if n_prompts > 1 else 16) if patched else 1
        rows = max(1, self.max_rows // part), max(1, self.head_rows // part)
        return ChunkLimits(max(1, n_prompts // 2), *rows)


class ChunkRunner:
    """Runs prompts in chunks, and takes smaller ones from then on when memory runs out.

    First it calls `give_up`, which frees what is held for convenience only and says of how many prompts.
    """

    def __init__(self, limits: ChunkLimits, give_up: Callable[[], int] = int) -> None:
        self.limits = limits
        self._give_up = give_up

    def run(
        self,
        plan: ChunkPlan,
        work: Callable[[Chunk, ChunkLimits], None],
        *,
        patched: bool,
        at_most: ChunkLimits | None = None,
    ) -> None:
        """Call `work` on every chunk; where memory runs out, again on the same prompts in smaller chunks.

        `patched` says that it runs patched tokens, whose limits then shrink too. The limits `at_most` are of
        this run alone. Where not even one prompt fits, a `MechdiffError` says so.
        """
        start, before = 0, None
        while start < len(plan):
            limits = self.limits if at_most is None else self.limits.within(at_most)
            chunk = plan.take(start, limits.batch_size)
            n = len(chunk)
            try:
                work(chunk, limits)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                reason = str(error)
            else:
                if before is not None:
                    warnings.warn(
                        f"Memory ran out with chunks of {before}; going on with {self.limits}.", stacklevel=4
                    )
                    before = None
                start += n
                continue
            # Only here are the frames gone that held what the failed attempt had computed.
            del chunk
            if given_up := self._give_up():
                release_memory()
                warnings.warn(
                    f"Memory ran out; what was kept of {given_up} recorded prompts is given up, and they are "
                    "run again where they are needed.",
                    stacklevel=4,
                )
                continue
            release_memory()
            before = before or limits
            less = limits.less(n, patched=patched)
            if less is None:
                raise does_not_fit(f"One prompt of {plan.n_tokens(start)} tokens does", reason)
            self.limits = less


def does_not_fit(what: str, reason: str) -> MechdiffError:
    """The error when nothing smaller can be tried."""
    first_line = reason.split("\n")[0].rstrip(".")[:150]
    return MechdiffError(
        f"{what} not fit in memory beside the model ({first_line}); shorten the prompts, load the model in "
        "bfloat16 or quantized, or use a device with more memory."
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on whatever device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(what in str(error) for what in _OUT_OF_MEMORY)


def release_memory() -> None:
    """Give back what nobody uses."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
