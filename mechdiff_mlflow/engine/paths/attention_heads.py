"""The heads of one attention sublayer: what each gives to the output projection.

attn_out = projection(z_1 ‖ … ‖ z_H) over query heads, so replacing some z is a replacement of attn_out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mechdiff_mlflow.engine.memory.oom_retry import ChunkLimits, ChunkRunner
from mechdiff_mlflow.engine.model.architecture import text_config
from mechdiff_mlflow.engine.model.chunks import Chunk, ChunkPlan, check_prompts
from mechdiff_mlflow.engine.model.forward import PromptForward
from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.spec.sites import Hook, Site
from mechdiff_mlflow.spec.tokens import TokenizedPrompts

_PROJECTIONS = ("o_proj", "out_proj", "c_proj", "dense", "wo")


class AttentionHeads:
    """Reads what the heads of a layer give to its output projection, and projects it.

    Raises:
        MechdiffError: The layer does not exist, its output projection is not recognised, or what it puts out
            is not what the block adds to the residual stream.
    """

    def __init__(self, forward: PromptForward, layer: int, runner: ChunkRunner) -> None:
        forward.decoder.check(Site(layer, Hook.ATTN_OUT))
        block = forward.decoder.blocks[layer]
        attention = block.attention
        found = [name for name in _PROJECTIONS if isinstance(getattr(attention, name, None), nn.Module)]
        if len(found) != 1 or block.attn_out is not attention:
            raise MechdiffError(
                f"The heads of layer {layer} cannot be told apart: {type(attention).__name__} does not add "
                "its output projection to the residual stream as it is; heads need Llama-like attention."
            )
        self.n_heads = int(text_config(forward.decoder.model).num_attention_heads)
        self._projection: nn.Module = getattr(attention, found[0])
        self._forward = forward
        self._runner = runner

    def capture(self, prompts: TokenizedPrompts) -> Tensor:
        """The z of every head at `prompts.positions`, [N, H, head width] in the model's dtype, on the CPU.

        Raises:
            MechdiffError: A token or position does not exist, or z does not divide among the heads.
        """
        check_prompts(prompts, self._forward.vocabulary)
        found: dict[int, Tensor] = {}

        def record(chunk: Chunk, limits: ChunkLimits) -> None:
            def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
                found.update(zip(chunk.index.tolist(), chunk.read(args[0]).cpu(), strict=True))

            handle = self._projection.register_forward_pre_hook(keep)
            try:
                self._forward(chunk)
            finally:
                handle.remove()

        self._runner.run(ChunkPlan(prompts, self._forward.device), record, patched=False)
        z = torch.stack([found[i] for i in range(len(prompts))])
        if z.shape[1] % self.n_heads:
            raise MechdiffError(
                f"The {z.shape[1]} inputs of the projection are not {self.n_heads} equal heads."
            )
        return z.reshape(len(z), self.n_heads, -1)

    def project(self, z: Tensor) -> Tensor:
        """attn_out [..., width] of heads' z [..., H, head width]."""
        with torch.no_grad():
            weight = next(self._projection.parameters())
            device = self._forward.device if weight.is_meta else weight.device  # offloaded, or here
            # Quantized weights are no floating numbers; z has the model's dtype already.
            dtype = weight.dtype if weight.is_floating_point() else z.dtype
            out: Tensor = self._projection(z.flatten(-2).to(device, dtype))
        return out.cpu()
