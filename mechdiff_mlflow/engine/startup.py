"""What is tried on a model before it is trusted: a few short prompts, padded."""

from __future__ import annotations

import torch
from torch import Tensor

from mechdiff_mlflow.engine.architecture import Decoder
from mechdiff_mlflow.engine.chunks import Chunk, in_chunks
from mechdiff_mlflow.engine.forward import PromptForward, Recording
from mechdiff_mlflow.engine.naive import NaivePath
from mechdiff_mlflow.engine.variants import Variants
from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.prompts import TokenizedPrompts
from mechdiff_mlflow.sites import Hook, Site


def check_hooks_are_causal(forward: PromptForward) -> None:
    """Replace the activation at every hook of the middle layer and see the logits change.

    Raises:
        MechdiffError: They do not change, so the hook is not where the model computes.
    """
    decoder = forward.decoder
    sites = [Site(len(decoder.blocks) // 2, hook) for hook in Hook]
    sites = [site for site in sites if _exists(decoder, site)]
    recording = forward.record(trial_chunk(forward), sites)
    naive = NaivePath(forward)
    for site in sites:
        key = {Hook.ATTN_OUT: "attn_out", Hook.MLP_OUT: "mlp_out"}.get(site.hook, "layers")
        if site not in recording.clean:
            raise MechdiffError(
                f"The activation at {site} was not reached by a forward of {type(decoder.model).__name__}; "
                f"set modules.{key} in the pair's spec."
            )
        (rows,) = naive.run(recording, [disturbed(recording, site, column=0)])
        if torch.equal(rows.logits, recording.logits):
            raise MechdiffError(
                f"Replacing the activation at {site} leaves the logits of {type(decoder.model).__name__} as "
                f"they were, so it is not what the model computes with; set modules.{key} in the pair's spec."
            )


def trial_chunk(forward: PromptForward) -> Chunk:
    """Two prompts of different length."""
    lengths, vocabulary = (5, 9), forward.vocabulary
    ids = tuple(tuple((17 * i + 5 * n) % vocabulary for i in range(n)) for n in lengths)
    prompts = TokenizedPrompts(ids, tuple(n - 1 for n in lengths))
    return next(in_chunks(prompts, len(lengths), forward.device))


def disturbed(recording: Recording, site: Site, column: int) -> Variants:
    """The clean activation plus a random vector of its own length."""
    clean = recording.clean[site]
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(column), dtype=torch.float32)
    direction = (noise / noise.norm(dim=-1, keepdim=True)).to(clean.device)
    size: Tensor = clean.float().norm(dim=-1, keepdim=True).clamp(min=1e-3)
    return Variants(site, (clean.float() + size * direction).to(clean.dtype).unsqueeze(1), [column])


def _exists(decoder: Decoder, site: Site) -> bool:
    try:
        decoder.check(site)
    except MechdiffError:
        return False
    return True
