"""Load the map in this directory into a model, as a forward hook; needs torch and safetensors alone.

import load_hook
handle = load_hook.attach(model)  # every token's activation at the site is mapped from now on
handle.remove()                   # and no longer
"""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


def attach(model: Any, folder: str | Path = Path(__file__).parent) -> RemovableHandle:
    """Map the activation of every token at the site that `hook.json` names; give the hook's handle."""
    config = json.loads((Path(folder) / "hook.json").read_text(encoding="utf-8"))
    if config.get("format") != "mechdiff-hook" or config.get("version") != 1:
        raise ValueError(f"{folder} holds no hook of format version 1: {config}")
    parts, alpha = load_file(str(Path(folder) / "map.safetensors")), config["alpha"]
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    site: nn.Module = inner.get_submodule(config["module"])

    def mapped(hidden: Tensor) -> Tensor:
        for name, part in parts.items():
            parts[name] = part.to(hidden.device)
        x = hidden.to(parts["left"].dtype) - parts["mean_in"]
        y = x @ parts["left"]
        y = y @ parts["right"] if "right" in parts else y
        mapped: Tensor = alpha * (y + parts["diagonal"] * x + parts["mean_out"])
        return mapped.to(hidden.dtype)

    def on_input(module: nn.Module, args: Any, kwargs: Any) -> Any:
        if args:
            return (mapped(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": mapped(kwargs["hidden_states"])}

    def on_output(module: nn.Module, args: Any, out: Any) -> Any:
        return (mapped(out[0]), *out[1:]) if isinstance(out, tuple) else mapped(out)

    if config["at"] == "input":
        return site.register_forward_pre_hook(on_input, with_kwargs=True)
    return site.register_forward_hook(on_output)
