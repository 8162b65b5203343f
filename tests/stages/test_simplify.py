from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from networks import NETWORKS, example
from torch import nn

from optpipe import StageError, Task, lower
from optpipe.context import Context
from optpipe.forms import form
from optpipe.stages.simplify import Standard
from optpipe.task import call, tensors_in


def kinds(model: nn.Module) -> set[str]:
    return {type(module).__name__ for module in model.modules()}


def test_batch_norm_dropout_and_identities_go_and_outputs_stay(model, context, task) -> None:
    before = model(task.example_inputs)
    ctx = context(model)
    simplified = Standard().run(model, ctx)
    assert "BatchNorm2d" not in kinds(simplified) and "Dropout" not in kinds(simplified)
    assert ctx.facts["folded_batch_norms"] == 2
    torch.testing.assert_close(simplified(task.example_inputs), before, rtol=1e-4, atol=1e-4)


def test_batch_norm_stays_where_training_follows(model, context) -> None:
    assert "BatchNorm2d" in kinds(Standard(fold_batch_norm=False).run(model, context(model)))


def test_a_norm_whose_input_others_read_is_left_alone(model, context, task) -> None:
    class Shared(nn.Module):
        """The convolution's output goes to the norm and to another module."""

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.act = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()

        def forward(self, image):
            x = self.conv(image)
            return (self.norm(x) + self.act(x)).mean((2, 3))

    shared = Shared().eval()
    ctx = context(shared)
    before = shared(task.example_inputs)
    torch.testing.assert_close(Standard().run(shared, ctx)(task.example_inputs), before)
    assert ctx.facts["folded_batch_norms"] == 0


def rows(ctx: Context, title: str = "Fusion opportunities") -> dict[tuple, tuple]:
    """The first two columns of a table of the report → the others."""
    return {tuple(row[:2]): tuple(row[2:]) for table in ctx.tables if table.title == title for row in table.rows}


@pytest.fixture
def simplify(task: Task, context) -> Callable[..., tuple[nn.Module, Context]]:
    """Simplify a network, on samples like `inputs`; its outputs stay what the task selects of them."""

    def run(model: nn.Module, inputs: Any = None, outputs: Sequence[str] = (), **settings) -> tuple[nn.Module, Context]:
        model.eval()
        if inputs is not None:
            batches = [(inputs, torch.zeros(len(tensors_in(inputs)[0])))]
            task.train = task.validation = task.calibration = task.test = batches
            task.example_inputs = inputs
        task.outputs = list(outputs)
        ctx = context(model)
        with torch.no_grad():
            before = task.selected(call(model, task.example_inputs))
            found = Standard(**settings).run(model, ctx)
            after = task.selected(call(found, task.example_inputs))
        for one, other in zip(tensors_in(before), tensors_in(after), strict=True):
            torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4)
        return found, ctx

    return run


class Reasons(nn.Module):
    """Tensors beside numbers, words and a list that grows."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.scores, self.sure = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 1)

    def forward(self, numbers, limit=3.0):
        steps = []
        while len(steps) < 5 and float(numbers.detach().abs().max()) < limit + len(steps):
            numbers = self.body(numbers).tanh()
            steps.append({"step": len(steps), "state": numbers})
        found = {"scores": self.scores(numbers), "sure": self.sure(numbers).sigmoid()}
        return {"found": found, "strategy": "deep", "depth": len(steps), "steps": steps}


def test_outputs_are_selected_and_what_is_dropped_is_listed(simplify) -> None:
    found, ctx = simplify(Reasons(), torch.randn(6, 8).clamp(-2, 2), ["scores", "found.sure"])
    with torch.no_grad():
        returned = found(torch.zeros(2, 8))
    assert {name: tuple(tensor.shape) for name, tensor in returned.items()} == {"scores": (2, 4), "found.sure": (2, 1)}
    dropped = rows(ctx, "Dropped outputs")
    assert ("strategy", "str") in dropped and ("depth", "int") in dropped and ("steps.*.step", "int") in dropped
    assert dropped["steps.*.state", "tensor (6, 8)"] == (5,)
    assert any("12 other outputs were dropped" in note for note in ctx.notes)


def test_a_model_with_selected_outputs_keeps_its_names_and_travels(simplify, tmp_path) -> None:
    x = torch.randn(6, 8).clamp(-2, 2)
    found, _ = simplify(Reasons(), x, ["scores"])
    assert [name for name, _ in found.named_children()] == ["body", "scores", "sure"] and isinstance(found, Reasons)
    form("torch").save(found, tmp_path)
    for other in (copy.deepcopy(found), form("torch").load(tmp_path), pickle.loads(pickle.dumps(found))):
        torch.testing.assert_close(other(x), found(x))
    assert "returns: scores" in repr(found)


def test_a_selected_model_is_exported_under_its_own_names(simplify, task) -> None:
    found, ctx = simplify(Dictionary(), torch.randn(4, 8), ["left"])
    assert rows(ctx)["Unread branch", "right"][0] == "left to the runtime"  # its graph no longer holds it
    program = lower.trace(found, task)
    assert [node.name for node in program.graph.nodes if node.op == "placeholder"][-1] == "numbers"
    torch.testing.assert_close(program.module()(task.example_inputs), found(task.example_inputs))


class Dictionary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(8, 2), nn.Linear(8, 3)

    def forward(self, numbers):
        return {"heads": [{"left": self.left(numbers)}, {"right": self.right(numbers)}], "names": ["left", "right"]}


def test_without_names_what_is_no_tensor_goes_and_the_structure_stays(simplify) -> None:
    found, ctx = simplify(Dictionary(), torch.randn(4, 8))
    returned = found(torch.randn(2, 8))
    assert list(returned) == ["heads"] and returned["heads"][1]["right"].shape == (2, 3)
    assert ctx.facts["dropped_outputs"] == 2


def test_tensors_that_come_and_go_stay_until_they_are_named(simplify) -> None:
    class Grows(nn.Module):
        def forward(self, numbers):
            return {"sum": numbers.sum(1), "parts": [numbers[:, 0]] * len(numbers), "name": "growing"}

    found, ctx = simplify(Grows(), torch.randn(4, 8))
    assert type(found) is Grows
    assert any("for some inputs" in note and "`outputs`" in note for note in ctx.notes)


def test_a_dataclass_is_flattened(simplify) -> None:
    found, _ = simplify(Answers(), torch.randn(4, 8), ["answer.scores", "sure"])
    assert list(found(torch.randn(2, 8))) == ["answer.scores", "sure"]


@dataclass
class Answer:
    scores: torch.Tensor
    why: str = "because"


class Answers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 4)

    def forward(self, numbers):
        scores = self.head(numbers)
        return Outcome(answer=Answer(scores), sure=scores.amax(1))


@dataclass
class Outcome:
    answer: Answer
    sure: torch.Tensor


@pytest.mark.parametrize(
    ("outputs", "words"),
    [
        (["center"], r"there is no tensor 'center'; the model returns heads\.0\.left, heads\.1\.right"),
        (["left", "names"], "there is no tensor 'names'"),
    ],
)
def test_outputs_that_name_nothing(simplify, outputs, words) -> None:
    with pytest.raises(StageError, match=words):
        simplify(Dictionary(), torch.randn(4, 8), outputs)


def test_outputs_that_name_several_or_others_than_the_task(context, task) -> None:
    class Twins(nn.Module):
        def forward(self, image):
            return {"left": {"mean": image.mean((2, 3))}, "right": {"mean": image.amax((2, 3))}}

    with pytest.raises(StageError, match=r"'mean' stands for left\.mean, right\.mean"):
        Standard(outputs=["mean"]).run(Twins(), context(Twins()))
    task.outputs = ["left.mean"]
    with pytest.raises(StageError, match=r"the task's metric and loss read \['left.mean'\]; name the same"):
        Standard(outputs=["right.mean"]).run(Twins(), context(Twins()))
    with pytest.raises(ValueError, match="names mean twice"):
        Standard(outputs=["mean", "mean"])


def test_a_model_of_tensors_only_is_not_wrapped(simplify, model) -> None:
    kind = type(model)
    assert type(simplify(model)[0]) is kind


def test_a_norm_is_left_alone_where_a_function_reads_its_input_too(simplify) -> None:
    class Peeks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
            self.norm.running_mean.fill_(3.0)

        def forward(self, image):
            x = self.conv(image)
            return (self.norm(x) + x).mean((2, 3))

    _, ctx = simplify(Peeks())
    assert rows(ctx)["Conv+BatchNorm", "conv, norm"] == ("refused", "the output of 'conv' is read by add() too")


def test_a_rewrite_that_changes_the_outputs_is_undone_alone(simplify) -> None:
    class Watched(nn.Module):
        """A weight is an output as well, which folding changes."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
            self.second, self.other = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
            for norm in (self.norm, self.other):
                norm.weight.data.fill_(2.0)

        def forward(self, image):
            x = self.other(self.second(self.norm(self.first(image)).relu()))
            return x.mean((2, 3)) + self.first.weight.sum()

    found, ctx = simplify(Watched())
    assert type(found.norm) is nn.BatchNorm2d and type(found.other) is nn.Identity
    status, reason = rows(ctx)["Conv+BatchNorm", "first, norm"]
    assert status == "refused" and "outputs changed by" in reason and "tolerance=0.0001" in reason
    assert rows(ctx)["Conv+BatchNorm", "second, other"] == ("applied", "")


def settled(norm: nn.Module) -> nn.Module:
    """A norm that does something."""
    for tensor in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
        tensor.uniform_(0.5, 1.5)
    return norm


def test_norms_fold_into_transposed_layers_and_into_the_layer_behind_them(simplify) -> None:
    network = nn.Sequential(
        settled(nn.BatchNorm2d(3)), nn.Conv2d(3, 8, 3, bias=False), nn.ReLU(),
        nn.ConvTranspose2d(8, 4, 2, 2), settled(nn.BatchNorm2d(4)), nn.ReLU(),
        nn.AvgPool2d(1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), settled(nn.BatchNorm1d(4)), nn.Linear(4, 4),
    )  # fmt: skip
    found, ctx = simplify(network)
    assert ctx.facts["folded_batch_norms"] == 3 and not {"BatchNorm2d", "BatchNorm1d", "AvgPool2d"} & kinds(found)
    assert [name for name, _ in found.named_children()] == ["1", "2", "3", "5", "7", "8", "10"]


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)), "no running statistics"),
        (nn.Sequential(settled(nn.BatchNorm2d(3)), nn.Conv2d(3, 4, 3, padding=1)), "pads its input by zeros"),
        (nn.Sequential(nn.ReLU(), settled(nn.BatchNorm2d(3))), "no convolution or linear layer is next to it"),
        (nn.Sequential(nn.Linear(8, 8), nn.Flatten(0, 1), nn.Linear(8, 8), settled(nn.BatchNorm1d(8)),
                       nn.Unflatten(0, (-1, 3)), nn.Linear(8, 8)), ""),
    ],
)  # fmt: skip
def test_norms_that_cannot_be_folded_say_why(simplify, network, reason) -> None:
    _, ctx = simplify(network)
    refused = [why for status, why in rows(ctx).values() if status == "refused"]
    assert any(reason in why for why in refused) if reason else ctx.facts["folded_batch_norms"] in (0, 1)


def test_linear_layers_in_a_row_become_one_where_that_is_smaller(simplify) -> None:
    network = nn.Sequential(
        nn.Flatten(), nn.Linear(192, 64), nn.Dropout(0.1), nn.Linear(64, 32), nn.Linear(32, 16), nn.ReLU(),
        nn.Linear(16, 2), nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 4),
    )  # fmt: skip
    found, ctx = simplify(network)
    assert [module.out_features for module in found if isinstance(module, nn.Linear)] == [16, 2, 16, 4]
    assert ctx.facts["merged_layers"] == 2
    status, reason = rows(ctx)["Linear+Linear", "6, 7"]
    assert status == "refused" and "would hold 256 weights, the two hold 64" in reason


def test_a_pointwise_convolution_is_merged_into_the_one_before_it(simplify) -> None:
    found, ctx = simplify(nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 8, 1), nn.ReLU()))
    assert ctx.facts["merged_layers"] == 1 and found[0].out_channels == 8


def test_layers_that_run_twice_or_are_read_twice_stay(simplify) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.again, self.read, self.last = (nn.Linear(8, 8) for _ in range(4))

        def forward(self, numbers):
            x = self.again(self.first(numbers))
            x = self.read(self.again(x).relu())
            return self.last(x) + x

    _, ctx = simplify(Twice(), torch.randn(4, 8))
    assert ctx.facts["merged_layers"] == 0
    reasons = " | ".join(reason for _, reason in rows(ctx).values())
    assert "'again' runs 2 times" in reasons and "the output of 'read' is read by add() too" in reasons


def test_a_model_with_a_branch_of_torchs_own_is_simplified(simplify) -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(192, 4), nn.Linear(192, 4)

        def forward(self, image):
            x = image.flatten(1)
            return torch.cond(x.sum() > 0, lambda v: self.one(v), lambda v: self.two(v), (x,))

    model = nn.Sequential(Branching(), nn.Identity(), nn.Linear(4, 4))
    assert "Identity" not in kinds(simplify(model)[0])


def test_a_copy_of_the_model_keeps_its_parametrised_weights(simplify) -> None:
    model = nn.Sequential(nn.Flatten(), nn.utils.parametrizations.weight_norm(nn.Linear(192, 4))).eval()
    baseline = copy.deepcopy(model)  # torch gives copies of a parametrised layer one class
    simplified, ctx = simplify(model)
    assert kinds(simplified) >= {"Linear"} and rows(ctx)
    assert baseline(torch.zeros(2, 3, 8, 8)).shape == (2, 4)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
def test_parametrised_weights_become_plain(simplify) -> None:
    network = nn.Sequential(
        nn.Flatten(), nn.utils.parametrizations.weight_norm(nn.Linear(192, 8)), nn.ReLU(),
        nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)), nn.ReLU(),
        nn.utils.weight_norm(nn.Linear(8, 4)),
    )  # fmt: skip
    with torch.no_grad():
        network(torch.randn(2, 3, 8, 8))  # or it cannot be copied
    found, ctx = simplify(network)
    assert {name for name in found.state_dict() if "weight" in name} == {"1.weight", "3.weight", "5.weight"}
    assert rows(ctx)["Parametrised weight", "1.weight"] == ("applied", "")
    assert form("torch").content_hash(found)


class Spare(nn.Module):
    """A head that never runs, one for training, a parameter that nothing reads."""

    def __init__(self, looks: bool = False) -> None:
        super().__init__()
        self.body, self.spare, self.auxiliary = nn.Linear(8, 4), nn.Linear(4, 999), nn.Linear(4, 4)
        self.gate, self.looks = nn.Parameter(torch.ones(77)), looks

    def forward(self, numbers):
        x = self.body(numbers)
        if self.looks and x.max() > 1e6:
            return self.spare(x)
        return x + self.auxiliary(x) if self.training else x


def test_weights_that_nothing_reads_go(simplify) -> None:
    found, ctx = simplify(Spare(), torch.randn(4, 8))
    assert type(found.spare) is nn.Identity and found.gate is None
    assert ctx.facts["dropped_parameters"] == 4 * 999 + 999 + 77
    assert rows(ctx)["Unused weights", "auxiliary"] == ("refused", "it is read while the model is trained")


def test_weights_behind_a_condition_stay(simplify) -> None:
    found, ctx = simplify(Spare(looks=True), torch.randn(4, 8))
    assert type(found.spare) is nn.Linear and ctx.facts["dropped_parameters"] == 0
    assert "the model looks at values (bool())" in rows(ctx)["Unused weights", "spare"][1]


class Written(nn.Module):
    """Attention as it is written out in many a repository."""

    def __init__(self, how: str = "divided") -> None:
        super().__init__()
        self.how, self.heads = how, 4
        self.query, self.key, self.value, self.out = (nn.Linear(32, 32) for _ in range(4))
        self.dropout = nn.Dropout(0.1)

    def forward(self, x, mask=None):
        n, length, width = x.shape
        query, key, value = (
            layer(x).view(n, length, self.heads, width // self.heads).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        scores = torch.matmul(query, key.transpose(-2, -1))
        if self.how == "einsum":
            return self.out(torch.einsum("nhqk,nhkd->nqhd", scores.softmax(-1), value).flatten(2))
        scores = scores / math.sqrt(query.size(-1))
        if mask is not None:
            scores = scores.masked_fill(mask[:, None, None] == 0, {"small": -5.0}.get(self.how, float("-inf")))
        weights = self.dropout(torch.softmax(scores, dim=-1))
        x = self.out((weights @ value).transpose(1, 2).reshape(n, length, width))
        return (x, weights) if self.how == "read" else x


class Reader(nn.Module):
    def __init__(self, attention: nn.Module, masked: bool = False) -> None:
        super().__init__()
        self.embedding, self.attention, self.head, self.masked = (
            nn.Embedding(50, 32),
            attention,
            nn.Linear(32, 4),
            masked,
        )

    def forward(self, tokens):
        x = self.embedding(tokens)
        x = self.attention(x, tokens > 5) if self.masked else self.attention(x)
        return self.head(x[0].mean(1) + x[1].mean((1, 2, 3))[:, None] if isinstance(x, tuple) else x.mean(1))


def operators(model: nn.Module, task: Task) -> str:
    return lower.trace(model, task).graph_module.code


@pytest.mark.parametrize("masked", [False, True])
def test_attention_that_is_written_out_becomes_one_operator(simplify, task, tmp_path, masked) -> None:
    tokens = torch.cat([torch.randint(6, 50, (6, 1)), torch.randint(0, 50, (6, 11))], 1)
    found, ctx = simplify(Reader(Written(), masked), tokens)
    assert rows(ctx)["Attention", "attention"] == ("applied", "")
    assert "scaled_dot_product_attention" in operators(found, task) and "softmax" not in operators(found, task)
    assert "attention.query.weight" in found.state_dict()
    form("torch").save(found, tmp_path)
    torch.testing.assert_close(form("torch").load(tmp_path)(tokens), copy.deepcopy(found)(tokens))


@pytest.mark.parametrize(
    ("how", "masked", "reason"),
    [
        ("einsum", False, "its product is written as einsum"),
        ("read", False, "its weights are read by"),
        ("small", True, "its masked scores become -5, not −∞"),
    ],
)
def test_attention_of_another_kind_says_why_it_stays(simplify, how, masked, reason) -> None:
    found, ctx = simplify(Reader(Written(how), masked), torch.randint(0, 50, (6, 12)))
    status, why = rows(ctx)["Attention", "attention"]
    assert status == "refused" and reason in why and type(found.attention) is Written


def test_an_argument_that_was_never_given_is_refused_later(simplify) -> None:
    found, _ = simplify(Reader(Written()), torch.randint(6, 50, (6, 12)))
    with pytest.raises(StageError, match=r"'mask' was None whenever simplify looked.*use_sdpa=false"):
        found.attention(torch.randn(2, 12, 32), torch.ones(2, 12))


def test_attention_weights_that_nobody_reads_are_not_computed(simplify, task) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = (nn.MultiheadAttention(32, 4, batch_first=True) for _ in range(2))

        def forward(self, x):
            x, _ = self.first(x, x, x)
            x, weights = self.second(x, x, x)
            return x.mean(1), weights

    found, ctx = simplify(Both(), torch.randn(4, 6, 32))
    assert rows(ctx)["Attention", "first"] == ("applied", "")
    assert rows(ctx)["Attention", "second"] == ("refused", "its weights are read by the model's output")
    assert isinstance(found.first, nn.MultiheadAttention)
    assert operators(found, task).count("scaled_dot_product_attention.default(") == 1


def test_what_the_runtime_fuses_is_told(simplify) -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), settled(nn.BatchNorm2d(4)), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.GELU(), nn.Flatten(),
        nn.Linear(64, 8), nn.ReLU(inplace=True), nn.Linear(8, 4),
    )  # fmt: skip
    _, ctx = simplify(network)
    found = rows(ctx)
    assert found["Conv+BatchNorm", "0, 1"] == ("applied", "")
    assert found["Conv+BatchNorm+ReLU", "0, 1, 2"][0] == found["Linear+ReLU", "6, 7"][0] == "left to the runtime"
    assert found["Conv+GELU", "3, 4"] == ("refused", "ONNX Runtime has no convolution with gelu in it")
    assert ctx.facts["fusions_found"] == len(found) and ctx.facts["fusions_left_to_runtime"] == 2


@pytest.mark.parametrize("name", list(NETWORKS))
def test_every_network_stays_what_it_is(simplify, name) -> None:
    torch.manual_seed(0)
    tokens = example(name)
    simplify(NETWORKS[name](), torch.cat([tokens, tokens.flip(0)]))


def test_a_model_of_transformers_leaves_attention_to_torch(simplify, task) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64,
        attn_implementation="eager",
    )  # fmt: skip
    inputs = {"input_ids": torch.randint(1, 50, (4, 12)), "attention_mask": torch.ones(4, 12, dtype=torch.long)}
    found, ctx = simplify(transformers.BertModel(config), inputs, ["pooler_output"])
    assert rows(ctx)["Attention", "SelectedBertModel"] == ("applied", "")
    assert "scaled_dot_product_attention" in operators(found, task)
