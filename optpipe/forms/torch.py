"""The form "torch": an nn.Module, as its author wrote it or as torch.fx rewrote it.

Written with pickle (cloudpickle, so that a class defined in a notebook travels too), and read back only from the
folder of the run that wrote it. The size is that of the safetensors file that holds its weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import safetensors.torch
import torch
import torch.ao.quantization.fx._decomposed  # registers the quantise operators that a graph may call
from torch import fx, nn

import optpipe.operators  # noqa: F401  registers those of optpipe's own
from optpipe.progress import quiet
from optpipe.store.code import attributes

NAME = "torch"


def matches(model: Any) -> bool:
    return isinstance(model, nn.Module) and not isinstance(model, torch.jit.ScriptModule)


def save(model: nn.Module, folder: Path) -> None:
    if isinstance(model, fx.GraphModule):
        model = _picklable(model)
    torch.save(model, folder / "module.pt", pickle_module=cloudpickle)
    safetensors.torch.save_model(model, str(folder / "weights.safetensors"))


def load(folder: Path) -> nn.Module:
    with quiet("torch"):
        model: nn.Module = torch.load(folder / "module.pt", weights_only=False)
    return model


def files(folder: Path) -> list[Path]:
    return [folder / "weights.safetensors"]


def size_bytes(folder: Path) -> int:
    return (folder / "weights.safetensors").stat().st_size


def as_callable(model: nn.Module) -> Callable[..., Any]:
    return model.eval() if not isinstance(model, fx.GraphModule) else model


def content_hash(model: nn.Module) -> str:
    digest = hashlib.sha256(structure(model).encode())
    for name, module in model.named_modules():
        digest.update(f"{name} {attributes(module, name, strict=False)}".encode())
    tensors = {**dict(model.named_buffers()), **model.state_dict()}  # not every buffer is saved with the weights
    for name, tensor in sorted(tensors.items()):
        update_with_tensor(digest, name, tensor)
    return digest.hexdigest()


def structure(model: nn.Module) -> str:
    """What `model` computes, as far as it can be read: the graph's code, or the tree of modules and their types."""
    if isinstance(model, fx.GraphModule):
        return graph_code(model)
    types = [f"{name}: {type(module).__module__}.{type(module).__qualname__}" for name, module in model.named_modules()]
    return "\n".join([repr(model), *types])


def graph_code(model: fx.GraphModule) -> str:
    """The code of its graph and of those inside it, as they are now: `model.code` is that of the last recompile()."""
    graphs = [(name, module) for name, module in model.named_modules() if isinstance(module, fx.GraphModule)]
    return "\n".join(f"{name}: {module.graph.python_code('self').src}" for name, module in graphs)


def update_with_tensor(digest: Any, name: str, tensor: torch.Tensor) -> None:
    """Add name, type, shape and values of `tensor` to `digest`."""
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


class GraphReader(fx.Tracer):
    """Makes a graph again from the code that torch.fx pickles, without computing what hangs on weights alone."""

    proxy_buffer_attributes = True


def _picklable(model: fx.GraphModule) -> fx.GraphModule:
    """A copy without what torch.export left in it: its metadata cannot be pickled, nor its tracer be made anew."""
    plain = fx.GraphModule(model, model.graph, class_name="GraphModule")
    plain.meta.clear()
    plain.__dict__.update(_tracer_cls=GraphReader, _tracer_extras={}, training=model.training)
    return plain
