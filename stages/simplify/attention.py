"""Attention: written out by hand, it becomes torch's scaled_dot_product_attention, which runtimes have kernels for.

softmax(scale · q kᵀ + mask) v as in Vaswani et al. 2017, https://arxiv.org/abs/1706.03762. Only the `forward` that
calls the softmax is captured, with the modules below it as they are; its module is replaced by that graph.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from optpipe.errors import StageError, named_reason
from optpipe.task import Inputs, call

from .flow import Flow, spoken
from .trials import Rewrite, Trials

PATTERN = "Attention"
SIMPLE = (bool, int, float, str, type(None))
ABSORBS = -1e8  # float32 scores added to this or less leave its softmax at exactly 0

PRODUCTS = {"matmul", "bmm"}
HANDS_ON = {"dropout", "contiguous", "clone", "to", "float", "type_as", "type"}  # where they do nothing; see _Values


class WithoutWeights(nn.MultiheadAttention):
    """Computes no attention weights, which nobody reads, so that torch takes scaled_dot_product_attention."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        return super().forward(
            query, key, value, key_padding_mask, need_weights=False, attn_mask=attn_mask, is_causal=is_causal
        )


class Fixed(nn.Module):
    """Refuses an argument that was another in every pass that the graph was captured from."""

    def __init__(self, name: str, value: Any) -> None:
        super().__init__()
        self.name, self.value = name, value

    def forward(self, found: Any) -> None:
        if found is not self.value and (isinstance(found, Tensor) or found != self.value):
            raise StageError(f"'{self.name}' was {self.value!r} whenever simplify looked; set simplify.use_sdpa=false")


def use_sdpa_of_transformers(trials: Trials, flow: Flow) -> list[Rewrite]:
    """Hugging Face models that compute attention by hand are told to leave it to torch, each with all its parts."""
    rewrites: list[Rewrite] = []
    done: list[str] = []
    for name, module in trials.model.named_modules():
        by_hand = getattr(getattr(module, "config", None), "_attn_implementation", None) == "eager"
        below = f"{name}." if name else ""
        if not by_hand or not hasattr(module, "set_attn_implementation") or any(map(name.startswith, done)):
            continue
        if not any(f"{owner}.".startswith(below) for owner in flow.softmax):
            continue
        done.append(below)
        where = (name or type(module).__name__,)
        if getattr(module, "_supports_sdpa", False):
            rewrites.append(Rewrite(PATTERN, where, _switched(module, "sdpa"), _switched(module, "eager")))
        else:
            trials.refuse(PATTERN, where, "transformers has no scaled_dot_product_attention for this model")
    return trials.make(rewrites)


def _switched(module: Any, to: str) -> Callable[[], None]:
    return lambda: module.set_attn_implementation(to)


def drop_weights(trials: Trials, flow: Flow) -> list[Rewrite]:
    """nn.MultiheadAttention whose weights nobody reads computes none."""
    rewrites = []
    for name, module in trials.model.named_modules():
        if type(module) is not nn.MultiheadAttention or not flow.calls(name) or not flow.gives(name, 1):
            continue
        if readers := flow.readers(name, 1):
            trials.refuse(PATTERN, (name,), f"its weights are read by {', '.join(map(spoken, readers))}")
        else:
            rewrites.append(Rewrite(PATTERN, (name,), _without_weights(module)))
    return trials.make(rewrites)


def _without_weights(module: nn.Module) -> Callable[[], None]:
    return lambda: setattr(module, "__class__", WithoutWeights)


def use_sdpa(trials: Trials, flow: Flow) -> list[Rewrite]:
    """Replace every module whose `forward` writes attention out."""
    model = trials.model
    rewrites = []
    for name in flow.softmax:
        owner = model.get_submodule(name)
        try:
            graph, replaced = _captured(owner, list(_arguments(model, owner, trials.batches)))
        except _Unfit as unfit:
            trials.refuse(PATTERN, (name or type(owner).__name__,), str(unfit))
            continue
        if not replaced:
            continue  # a softmax of something else
        if not name:
            trials.refuse(PATTERN, (type(owner).__name__,), "the model itself writes it out; move it into a module")
            continue
        rewrites.append(Rewrite(PATTERN, (name,), _put(model, name, graph)))
    return trials.make(rewrites)


def _put(model: nn.Module, name: str, graph: fx.GraphModule) -> Callable[[], None]:
    return lambda: model.set_submodule(name, graph)


class _Unfit(Exception):
    """Why a piece of code is not replaced."""


def _arguments(model: nn.Module, owner: nn.Module, batches: list[Inputs]) -> Iterator[dict[str, Any]]:
    """What `owner` is given, by name, each time that it runs."""
    signature = inspect.signature(type(owner).forward)
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in signature.parameters.values()):
        raise _Unfit("its forward takes any arguments (* or **), which cannot be captured")
    calls: list[dict[str, Any]] = []

    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        bound = signature.bind(module, *args, **kwargs)
        bound.apply_defaults()
        calls.append(dict(list(bound.arguments.items())[1:]))

    handle = owner.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        for inputs in batches:
            with torch.no_grad():
                call(model, inputs)
    finally:
        handle.remove()
    yield from calls


class _Tracer(fx.Tracer):
    """Captures one `forward`, calling the modules below it; `fixed` arguments keep their value."""

    def __init__(self, fixed: dict[str, Any]) -> None:
        super().__init__()
        self.fixed = fixed

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return True

    def _proxy_placeholder(self, name: str, concrete_args: Any, sig: inspect.Signature, fn_for_analysis: Any) -> Any:
        default = sig.parameters[name].default
        proxy = self.create_proxy("placeholder", name, () if default is inspect.Parameter.empty else (default,), {})
        return self.fixed.get(name, proxy)


def _captured(owner: nn.Module, calls: list[dict[str, Any]]) -> tuple[fx.GraphModule, int]:
    """`owner` as a graph with its attention replaced, and how often it holds such."""
    fixed = {}
    for name, value in calls[0].items():
        if all(isinstance(seen[name], Tensor) for seen in calls):
            continue
        if not isinstance(value, SIMPLE) or any(type(c[name]) is not type(value) or c[name] != value for c in calls):
            raise _Unfit(f"its argument '{name}' is not always a tensor, nor always the same")
        fixed[name] = value
    try:
        graph = _Tracer(fixed).trace(owner)
        module = fx.GraphModule(owner, graph, type(owner).__name__)
        values = _Values(module)
        values.run(*calls[0].values())
    except Exception as error:  # whatever a forward raises that asks more of a tensor than a graph can tell
        raise _Unfit(f"its forward cannot be captured ({named_reason(error)})") from error
    softmaxes = [node for node in graph.nodes if _called(node, values) == "softmax"]
    replaced = sum(_replace(node, values) for node in softmaxes)
    for node in [node for node in graph.nodes if node.op == "placeholder" and node.name in fixed]:
        module.add_submodule(f"{node.name}_is_fixed", Fixed(node.name, fixed[node.name]))
        with graph.inserting_after(node):
            graph.call_module(f"{node.name}_is_fixed", (node,))
    graph._tracer_cls = fx.Tracer  # which makes it again from its code after pickling
    module.__dict__["_tracer_cls"] = fx.Tracer
    graph.lint()
    module.recompile()
    module.train(owner.training)
    return module, replaced


class _Values(fx.Interpreter):
    """Runs a graph and keeps what every node gave."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.of: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        with torch.no_grad():
            self.of[n] = super().run_node(n)
        return self.of[n]

    def __getitem__(self, operand: Any) -> Any:
        return self.of[operand] if isinstance(operand, fx.Node) else operand


def _called(node: fx.Node, values: _Values) -> str:
    """The name of the function, method or kind of module that `node` calls, in small letters without underscores."""
    if node.op == "call_module":
        return type(values.module.get_submodule(str(node.target))).__name__.lower()
    if node.op == "call_method":
        return str(node.target).strip("_")
    return getattr(node.target, "__name__", "").strip("_") if node.op == "call_function" else ""


def _given(node: fx.Node, place: int, name: str, default: Any = None) -> Any:
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def _is_handed_on(node: fx.Node, values: _Values) -> bool:
    """Whether `node` gives what it reads."""
    kind = _called(node, values)
    if kind == "identity" or kind.startswith("dropout"):
        return True
    before = values[node.args[0]] if kind in HANDS_ON and node.args else None
    return isinstance(before, Tensor) and before.dtype == values[node].dtype and torch.equal(before, values[node])


def _replace(softmax: fx.Node, values: _Values) -> bool:
    """Replace the attention around `softmax`; False if there is none, _Unfit if it is one of another kind."""
    weights, path = softmax, [softmax]
    while len(weights.users) == 1 and _is_handed_on(user := next(iter(weights.users)), values):
        weights = user
        path.append(user)
    product = next((n for n in weights.users if _called(n, values) in PRODUCTS and n.args[0] is weights), None)
    if product is None:
        if any(_called(user, values) == "einsum" for user in weights.users):
            raise _Unfit("its product is written as einsum")
        return False
    if others := [user for node in path for user in node.users if user is not product and user not in path]:
        raise _Unfit(f"its weights are read by {_said(others[0], values)} too")
    if _given(softmax, 1, "dim", getattr(_module(softmax, values), "dim", None)) not in (-1, values[softmax].dim() - 1):
        raise _Unfit("its softmax is not over the keys")
    scores, steps = _before(softmax, values)
    _write(scores, steps, product, values)
    return True


def _module(node: fx.Node, values: _Values) -> Any:
    return values.module.get_submodule(str(node.target)) if node.op == "call_module" else None


def _said(node: fx.Node, values: _Values) -> str:
    if node.op == "output":
        return "what reads its result"
    return f"'{node.target}'" if node.op == "call_module" else f"{_called(node, values)}()"


Change = tuple[str, Any, Any]  # ("scale", ×/÷, a number), ("add", a tensor, None) or ("mask", where, value)


def _before(softmax: fx.Node, values: _Values) -> tuple[fx.Node, list[Change]]:
    """The product of queries and keys, and what is done to it until `softmax`, first things first."""
    changes: list[Change] = []
    node: Any = softmax.args[0]
    while _called(node, values) not in PRODUCTS:
        if len(node.users) > 1:
            raise _Unfit(f"its scores are read by {len(node.users)} operations")
        kind = _called(node, values).removeprefix("i") if node.op == "call_function" else _called(node, values)
        if _is_handed_on(node, values):
            node = node.args[0]
        elif kind in ("mul", "multiply", "truediv", "div", "divide"):
            node, change = _scale(node, kind, values)
            changes.append(change)
        elif kind == "add":
            node, other = _scores_and_other(node, values)
            changes.append(("add", other, None))
        elif kind == "masked_fill":
            changes.append(("mask", node.args[1], values[_given(node, 2, "value")]))
            node = node.args[0]
        elif kind == "where" and len(node.args) == 3 and isinstance(values[node.args[1]], Tensor):
            where, kept, value = node.args
            changes.append(("keep", where, values[value]))
            node = kept
        else:
            raise _Unfit(f"its scores come from {_said(node, values)}, not from a product of queries and keys")
        if not isinstance(node, fx.Node):
            raise _Unfit("its scores are constant")
    if len(node.users) > 1:
        raise _Unfit(f"its scores are read by {len(node.users)} operations")
    return node, changes[::-1]


def _scores_and_other(node: fx.Node, values: _Values) -> tuple[Any, Any]:
    """The operand of `node` that the scores are, by their shape, and the other one."""
    first, second = node.args[:2]
    if node.kwargs:
        raise _Unfit(f"its scores go through {_said(node, values)} with {', '.join(node.kwargs)}")
    made = [isinstance(o, fx.Node) and isinstance(values[o], Tensor) and values[o].shape == values[node].shape
            and o.op not in ("placeholder", "get_attr") for o in (first, second)]  # fmt: skip
    return (first, second) if made[0] else (second, first)


def _scale(node: fx.Node, kind: str, values: _Values) -> tuple[Any, Change]:
    scores, factor = _scores_and_other(node, values)
    found = values[factor]
    if isinstance(found, Tensor) and (found.numel() > 1 or (factor is node.args[0] and "div" in kind)):
        raise _Unfit(f"its scores are scaled by a tensor of shape {tuple(found.shape)}")
    return scores, ("scale", operator.truediv if "div" in kind else operator.mul, factor)


def _write(scores: fx.Node, changes: list[Change], product: fx.Node, values: _Values) -> None:
    """Put scaled_dot_product_attention in the place of everything from `scores` to `product`."""
    graph = product.graph
    query, keys = scores.args[:2]
    scale: Any = 1.0
    mask: Any = None
    tensor_scales = []

    def made(function: Any, *args: Any) -> Any:
        return function(*args) if not any(isinstance(a, fx.Node) for a in args) else graph.call_function(function, args)

    with graph.inserting_before(product):
        for what, first, second in changes:
            if what == "scale":
                if isinstance(values[second], Tensor):
                    tensor_scales.append((first, second))
                else:
                    scale = made(first, scale, second)
                mask = made(first, mask, second) if mask is not None else None
            elif what == "add":
                mask = first if mask is None else made(operator.add, mask, first)
            else:
                mask = _masked(made, mask, first, second, what == "keep", values)
        for function, factor in tensor_scales:
            query = made(function, query, factor)
        if mask is not None and values[query].dtype is not torch.float32:
            mask = graph.call_method("to", (mask, values[query].dtype))
        transposed = graph.call_method("transpose", (keys, -2, -1))
        arguments = {"attn_mask": mask, "dropout_p": 0.0, "scale": scale}
        new = graph.call_function(F.scaled_dot_product_attention, (query, transposed, product.args[1]), arguments)
    product.replace_all_uses_with(new)
    unread = [product]
    while unread:
        node = unread.pop()
        if not node.users and node.op != "placeholder":
            unread += node.all_input_nodes
            graph.erase_node(node)


def _masked(made: Any, mask: Any, where: Any, value: Any, keeps: bool, values: _Values) -> Any:
    """`mask` with `value` added where the scores are replaced by it, as a tensor that is added to them."""
    number = (
        float(value) if isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1) else 0.0
    )
    if number > ABSORBS:
        raise _Unfit(f"its masked scores become {number:g}, not −∞; added to a score that is not the same")
    added = made(torch.where, where, *((0.0, number) if keeps else (number, 0.0)))
    return added if mask is None else made(operator.add, mask, added)
