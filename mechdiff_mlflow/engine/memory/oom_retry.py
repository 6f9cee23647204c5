"""Chunk by chunk, and less at a time when memory runs out."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator, Sized
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from mechdiff_mlflow.errors import MechdiffError

T = TypeVar("T", bound=Sized)
T_co = TypeVar("T_co", bound=Sized, covariant=True)

_OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""What torch says where it raises no `OutOfMemoryError`: on the CPU, and in cuBLAS."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """How much an engine holds at a time.

    Raises:
        MechdiffError: One is under 1.
    """

    batch_size: int = 16  # prompts in one forward
    max_rows: int = 8192  # patched tokens that go up the layers together
    head_rows: int = 2048  # rows of logits in memory together

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_rows", "head_rows"):
            if getattr(self, name) < 1:
                raise MechdiffError(f"{name} is {getattr(self, name)}; give at least 1.")

    def __str__(self) -> str:
        return (
            f"{self.batch_size} prompts, {self.max_rows} patched tokens and {self.head_rows} rows of logits"
        )

    def within(self, other: Bounds) -> Bounds:
        """The smaller of each."""
        return Bounds(
            min(self.batch_size, other.batch_size),
            min(self.max_rows, other.max_rows),
            min(self.head_rows, other.head_rows),
        )

    def less(self, n_prompts: int, *, patched: bool) -> Bounds | None:
        """What to try after these failed on n prompts; None when there is nothing smaller.

        Args:
            n_prompts: How many were run together.
            patched: Whether patched tokens were run, or the prompts alone.
        """
        smallest = n_prompts == 1 and (not patched or self.max_rows == self.head_rows == 1)
        if smallest:
            return None
        # One prompt alone: the rest is due to patched tokens, and each attempt costs a forward.
        part = (2 if n_prompts > 1 else 16) if patched else 1
        rows = max(1, self.max_rows // part), max(1, self.head_rows // part)
        return Bounds(max(1, n_prompts // 2), *rows)


class Source(Protocol[T_co]):
    """Prompts in some order, a few of which are taken at a time; what is taken has a length."""

    def __len__(self) -> int: ...

    def n_tokens(self, start: int) -> int:
        """Of the prompt at a place in the order."""

    def take(self, start: int, size: int) -> T_co:
        """At least one and at most `size` prompts from a place in the order on."""


class Elastic:
    """Runs prompts in chunks, and takes smaller ones from then on when memory runs out.

    Args:
        bounds: What to begin with.
        give_up: Frees what is held for convenience only, and says how many prompts that was of.
    """

    def __init__(self, bounds: Bounds, give_up: Callable[[], int] = int) -> None:
        self.bounds = bounds
        self._give_up = give_up

    def run(
        self,
        source: Source[T],
        work: Callable[[T, Bounds], None],
        *,
        patched: bool,
        at_most: Bounds | None = None,
    ) -> Iterator[int]:
        """How many prompts each chunk had, once `work` is through with it.

        Where memory runs out, what is kept for convenience goes first; then smaller chunks begin again at the
        same prompt.

        Args:
            source: All prompts.
            work: What is done with a chunk within bounds; may be called again on the same prompts.
            patched: Whether `work` runs patched tokens, whose bounds then shrink too.
            at_most: Bounds of this run alone.

        Raises:
            MechdiffError: Not even one prompt fits.
        """
        start, before = 0, None
        while start < len(source):
            bounds = self.bounds if at_most is None else self.bounds.within(at_most)
            chunk = source.take(start, bounds.batch_size)
            n = len(chunk)
            try:
                work(chunk, bounds)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                reason = str(error)
            else:
                if before is not None:
                    warnings.warn(
                        f"Memory ran out with chunks of {before}; going on with {self.bounds}.", stacklevel=3
                    )
                    before = None
                start += n
                yield n
                continue
            # Only here are the frames gone that held what the failed attempt had computed.
            del chunk
            if given_up := self._give_up():
                release_memory()
                warnings.warn(
                    f"Memory ran out; what was kept of {given_up} recorded prompts is given up, and they are "
                    "run again where they are needed.",
                    stacklevel=3,
                )
                continue
            release_memory()
            before = before or bounds
            less = bounds.less(n, patched=patched)
            if less is None:
                raise does_not_fit(f"One prompt of {source.n_tokens(start)} tokens does", reason)
            self.bounds = less


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
