"""`optpipe.load`: what it takes, what it refuses and in which words, its pool and its cache."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import optpipe
from optpipe import OptpipeError, Task, lower, manifest
from optpipe.deployed import DeployedModel
from optpipe.metrics import top1_accuracy
from optpipe.signature import Input
from optpipe.target import Target


class Lookup(nn.Module):
    """Rows (n, 3, 5) weighted by queries (n, 2, 5), and a table's entry for each of n tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 5)

    def forward(self, rows, queries, tokens):
        return rows @ queries.transpose(1, 2), self.table(tokens)


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, x):
        return self.linear(x)


def task_of(inputs: Any, **more: Any) -> Task:
    empty: list = []
    return Task(
        train=empty, validation=empty, calibration=empty, test=empty,
        example_inputs=inputs, metric=top1_accuracy(), **more,
    )  # fmt: skip


def deploy(model: nn.Module, task: Task, folder: Path, form: str, runtime: str) -> Path:
    """A run's folder with nothing in it but the deployed model."""
    folder.mkdir(parents=True, exist_ok=True)
    product: Any = model.eval()
    if form != "torch":
        product = lower.trace(product, task)
    if form == "onnx":
        product = lower.to_onnx(product, folder / "exported.onnx", input_names=task.input_names)
    manifest.deploy(product, form, folder, Target(runtime=runtime, threads=1), runtime, task)
    return folder


KINDS = [("onnx", "onnxruntime"), ("onnx", "openvino"), ("program", "torch"), ("torch", "torch")]


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def lookup(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of three inputs and two outputs, in every form and engine."""
    torch.manual_seed(0)
    task = task_of((torch.randn(4, 3, 5), torch.randn(4, 2, 5), torch.arange(4)))
    return deploy(Lookup(), task, tmp_path_factory.mktemp("lookup"), *request.param)


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def line(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of one input and one output, in every form and engine."""
    torch.manual_seed(0)
    return deploy(Line(), task_of(torch.randn(4, 4)), tmp_path_factory.mktemp("line"), *request.param)


def three(n: int = 2) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        "rows": random.normal(size=(n, 3, 5)).astype(np.float32),
        "queries": random.normal(size=(n, 2, 5)).astype(np.float32),
        "tokens": np.arange(n),
    }


def numbers(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32)


def test_by_position_by_name_and_both_give_the_same(lookup: Path) -> None:
    model, given = optpipe.load(lookup), three()
    scores, entries = model(*given.values())
    np.testing.assert_allclose(scores, given["rows"] @ given["queries"].swapaxes(1, 2), rtol=1e-5, atol=1e-6)
    assert entries.shape == (2, 5)
    for again in (model(**given), model(given["rows"], tokens=given["tokens"], queries=given["queries"])):
        np.testing.assert_array_equal(again[0], scores)
        np.testing.assert_array_equal(again[1], entries)


@pytest.mark.parametrize(("form", "runtime"), KINDS)
def test_inputs_that_a_task_gives_by_name(tmp_path: Path, form: str, runtime: str) -> None:
    names = ["tokens", "queries", "rows"]  # not the order of forward
    example = {name: torch.from_numpy(three(4)[name]) for name in names}
    model = optpipe.load(deploy(Lookup(), task_of(example), tmp_path, form, runtime))
    given = three()
    np.testing.assert_allclose(model(**given)[0], given["rows"] @ given["queries"].swapaxes(1, 2), rtol=1e-5, atol=1e-6)
    order = [each["name"] for each in model.manifest["inputs"]]
    np.testing.assert_array_equal(model(*(given[name] for name in order))[1], model(**given)[1])


def changed(name: str, change: Callable[[np.ndarray], Any]) -> Callable[[], Any]:
    """A call with one input changed."""
    return lambda: {**three(), name: change(three()[name])}


BAD: list[tuple[Callable[[], Any], str]] = [
    (changed("rows", lambda a: a.astype(np.float64)), r"'rows' has dtype float64.*float32.*array\.astype\(np\.float32"),
    (changed("rows", lambda a: a.astype(">f4")), r"'rows' has dtype >f4.*astype"),
    (changed("rows", lambda a: a.astype(object)), r"'rows' has dtype object.*astype\(np\.float32\)"),
    (changed("tokens", lambda a: a.astype(np.int32)), r"'tokens' has dtype int32.*int64.*astype\(np\.int64\)"),
    (changed("tokens", lambda a: a.astype(np.float32)), r"'tokens' has dtype float32.*nothing is cast"),
    (changed("rows", lambda a: a.tolist()), r"'rows' is of type list.*pass np\.asarray\(value, np\.float32\)"),
    (changed("rows", torch.from_numpy), r"'rows' is of type torch\.Tensor.*pass tensor\.numpy\(force=True\)"),
    (changed("rows", lambda a: None), r"'rows' is of type NoneType"),
    (changed("rows", np.ma.masked_array), r"'rows' is a masked array.*filled"),
    (changed("rows", lambda a: a[0]), r"'rows' has 2 dimensions, shape \(3, 5\).*batch.*array\[np\.newaxis\]"),
    (changed("rows", lambda a: a[None]), r"'rows' has 4 dimensions.*\(1, 2, 3, 5\)"),
    (lambda: {**three(), "row": three()["rows"]}, r"no input 'row'; did you mean 'rows'\?.*3 inputs"),
    (lambda: {"rows": three()["rows"]}, r"input 'queries' is missing; the model takes 3 inputs \(rows: float32"),
    (lambda: (), r"input 'rows' is missing"),
    (lambda: (*three().values(), three()["rows"]), r"4 inputs were given, and the model takes 3 inputs"),
    (lambda: list(three().values())[:2], r"input 'tokens' is missing"),
    (lambda: [three()["queries"], {"rows": three()["rows"]}], r"'rows' was given twice"),
    (changed("queries", lambda a: np.repeat(a, 3, 0)), r"'queries' .* \(6, 2, 5\).*batch is 6 here and 2 in 'rows'"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "words"), BAD, ids=[words for _, words in BAD])
def test_bad_inputs_get_one_message(lookup: Path, given: Callable[[], Any], words: str) -> None:
    what = given()
    named = what if isinstance(what, dict) else next((part for part in what if isinstance(part, dict)), {})
    arrays = [] if isinstance(what, dict) else [part for part in what if not isinstance(part, dict)]
    model = optpipe.load(lookup)
    with pytest.raises(OptpipeError, match=words) as raised:
        model(*arrays, **named)
    assert "\n" not in str(raised.value)
    assert len(model(**three())) == 2  # and the model still answers


def test_a_size_that_the_model_fixes(line: Path) -> None:
    model = optpipe.load(line)
    words = r"'x' has shape \(2, 3\).*\(batch, 4\): dimension 1 is 3 and must be 4"
    if model.manifest["form"] == "torch":  # where only the engine knows
        words = r"torch cannot run the model on float32 \(2, 3\): RuntimeError: mat1 and mat2"
    with pytest.raises(OptpipeError, match=words):
        model(numbers(2, 3))


def test_what_only_the_engine_can_refuse(lookup: Path) -> None:
    if "openvino" in str(json.loads((lookup / "model" / "manifest.json").read_text())["runtime"]):
        pytest.skip("OpenVINO reads an entry that a table does not have as zeros")
    with pytest.raises(OptpipeError, match=r"cannot run the model on float32 \(2, 3, 5\)"):
        optpipe.load(lookup)(**{**three(), "tokens": np.array([0, 99])})


@pytest.mark.parametrize(
    "arrange",
    [
        lambda a: np.asfortranarray(a),
        lambda a: np.repeat(a, 2, axis=1)[:, ::2],
        lambda a: a[::-1].copy()[::-1],
        lambda a: np.frombuffer(b"0" + a.tobytes(), np.uint8)[1:].view(np.float32).reshape(a.shape),
    ],
    ids=["fortran", "strided", "reversed", "unaligned, read-only"],
)
def test_arrays_however_they_lie_in_memory(line: Path, arrange: Callable[[np.ndarray], np.ndarray]) -> None:
    model, x = optpipe.load(line), numbers(6, 4)
    np.testing.assert_array_equal(model(arrange(x)), model(x))
    np.testing.assert_array_equal(optpipe.load(line, cache=2)(arrange(x)), model(x))


def test_a_result_stays_when_the_model_is_called_again(line: Path) -> None:
    model = optpipe.load(line)
    first = model(numbers(3, 4))
    kept = first.copy()
    model(numbers(3, 4) + 1)
    np.testing.assert_array_equal(first, kept)


@pytest.mark.parametrize("workers", [1, 2])
def test_many_threads_each_get_their_own_results(line: Path, workers: int) -> None:
    model = optpipe.load(line, workers=workers)
    inputs = [numbers(1 + i % 3, 4) + i for i in range(40)]
    expected = [model(x) for x in inputs]
    with ThreadPoolExecutor(8) as threads:
        for _ in range(5):
            for got, want in zip(threads.map(model, inputs), expected, strict=True):
                np.testing.assert_allclose(got, want, rtol=1e-6)


def test_no_more_calls_at_once_than_workers() -> None:
    together, busy, most = threading.Barrier(2, timeout=30), [0], []

    def runner(x: Any) -> list[Any]:
        busy[0] += 1
        together.wait()  # until two are inside: both workers are used
        most.append(busy[0])
        together.wait()
        busy[0] -= 1
        return [x]

    model = DeployedModel({}, [Input("x")], [runner, runner], 0)
    with ThreadPoolExecutor(6) as threads:
        list(threads.map(model, [numbers(1, 4)] * 6))
    assert most == [2] * 6


def test_a_worker_is_free_again_after_an_error() -> None:
    def broken(x: Any) -> list[Any]:
        raise RuntimeError("no")

    model = DeployedModel({"runtime": "this engine"}, [Input("x")], [broken, broken], 0)
    for _ in range(5):
        with pytest.raises(OptpipeError, match=r"this engine cannot run the model on float32 .*: no"):
            model(numbers(1, 4))


def test_map_keeps_the_order_and_does_not_run_ahead(line: Path) -> None:
    model, read = optpipe.load(line, workers=2), []

    def batches() -> Any:
        for i in range(50):
            read.append(i)
            yield (numbers(2, 4) + i, {"x": numbers(2, 4) + i}, (numbers(2, 4) + i,))[i % 3]

    results = model.map(batches())
    first = next(results)
    assert len(read) <= 5
    rest = [first, *results]
    assert len(rest) == 50
    for i, got in enumerate(rest):
        np.testing.assert_array_equal(got, model(numbers(2, 4) + i))


def test_map_raises_where_a_batch_is_wrong(line: Path) -> None:
    results = optpipe.load(line).map([numbers(2, 4), numbers(2)])
    assert next(results).shape == (2, 2)
    with pytest.raises(OptpipeError, match="has 1 dimensions"):
        next(results)


def test_a_known_input_is_answered_from_the_cache_with_a_copy(lookup: Path) -> None:
    plain, model, given = optpipe.load(lookup), optpipe.load(lookup, cache=10), three()
    first = model(**given)
    first[0][:] = 0  # of the caller's own
    second = model(*(array.copy() for array in given.values()))
    for got, want in zip(second, plain(**given), strict=True):
        np.testing.assert_array_equal(got, want)
    second[1][:] = 0
    np.testing.assert_array_equal(model(**given)[1], plain(**given)[1])
    assert model.cache_info() == (2, 1, 10, 1)
    assert plain.cache_info() == (0, 0, 0, 0)


def test_the_cache_tells_shapes_and_every_element_apart(line: Path) -> None:
    model = optpipe.load(line, cache=10)
    x = np.zeros((2, 4), np.float32)
    assert model(x).shape == (2, 2) and model(x[:1]).shape == (1, 2)
    x[1, 3] = 1
    assert not np.array_equal(model(x)[0], model(x)[1])
    assert model.cache_info() == (1, 3, 10, 3)


def test_the_cache_drops_what_was_not_used_longest(line: Path) -> None:
    model = optpipe.load(line, cache=2)
    a, b, c = (numbers(1, 4) + i for i in range(3))
    for x in (a, b, a, c):  # b goes
        model(x)
    assert model.cache_info() == (1, 3, 2, 2)
    model(a)
    assert model.cache_info().hits == 2
    model(b)
    assert model.cache_info() == (2, 4, 2, 2)


def test_a_cache_for_many_threads(line: Path) -> None:
    model = optpipe.load(line, workers=2, cache=5)
    inputs = [numbers(1, 4) + i % 8 for i in range(200)]
    expected = [optpipe.load(line)(x) for x in inputs[:8]]
    with ThreadPoolExecutor(8) as threads:
        for i, got in enumerate(threads.map(model, inputs)):
            np.testing.assert_allclose(got, expected[i % 8], rtol=1e-6)
    info = model.cache_info()
    assert info.hits + info.misses == 200 and info.currsize == 5


def test_wrong_inputs_are_refused_before_the_cache(line: Path) -> None:
    model = optpipe.load(line, cache=5)
    with pytest.raises(OptpipeError, match="dtype float64"):
        model(np.zeros((1, 4)))
    assert model.cache_info() == (0, 0, 5, 0)


@pytest.mark.parametrize("settings", [{}, {"workers": 2}, {"cache": 2}])
def test_a_closed_model_says_so(line: Path, settings: dict[str, int]) -> None:
    with optpipe.load(line, **settings) as model:
        model(numbers(1, 4))
    with pytest.raises(OptpipeError, match="was closed; load it again"):
        model(numbers(1, 4))
    model.close()  # twice does no harm


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"threads": 0}, "threads is 0; it must be a whole number of at least 1"),
        ({"threads": "two"}, "threads is 'two'"),
        ({"workers": 0}, "workers is 0; it must be a whole number of at least 1"),
        ({"workers": 1.5}, "workers is 1.5"),
        ({"cache": -1}, "cache is -1; it must be a whole number of at least 0"),
    ],
)
def test_bad_settings(line: Path, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(OptpipeError, match=re.escape(words)):
        optpipe.load(line, **settings)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"files": {}}, r"does not name \w+\.\w+, so it cannot be checked"),
        ({"files": ["model.onnx"]}, "its files have no sums"),
        ({"files": {"../else": {}}}, "which is not in its folder"),
        ({"inputs": 5}, "cannot be read"),
        ({"inputs": []}, "it names no inputs"),
        ({"inputs": [{"dtype": "float32"}]}, "cannot be read"),
        ({"inputs": [{"name": "x", "dtype": "float33"}]}, "cannot be read"),
        ({"target": {}}, "cannot be read"),
        ({"runtime": "tomorrow"}, "the runtime 'tomorrow', and this optpipe does not have both"),
        ({"form": "tomorrow"}, "names the form 'tomorrow'"),
    ],
)
def test_a_manifest_that_makes_no_sense(line: Path, tmp_path: Path, change: dict[str, Any], words: str) -> None:
    (tmp_path / "model").mkdir()
    for path in (line / "model").iterdir():
        (tmp_path / "model" / path.name).write_bytes(path.read_bytes())
    file = tmp_path / "model" / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(OptpipeError, match=words):
        optpipe.load(tmp_path)


def test_a_manifest_with_names_only_is_checked_for_names(line: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    for path in (line / "model").iterdir():
        (tmp_path / "model" / path.name).write_bytes(path.read_bytes())
    file = tmp_path / "model" / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"inputs": ["x"]}))
    model = optpipe.load(tmp_path)
    np.testing.assert_array_equal(model(numbers(2, 4)), optpipe.load(line)(numbers(2, 4)))
    with pytest.raises(OptpipeError, match="no input 'y'"):
        model(y=numbers(2, 4))
    with pytest.raises(OptpipeError, match="is of type list"):
        model([1.0])


def test_files_that_the_manifest_does_not_name_are_not_read(line: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    for path in (line / "model").iterdir():
        (tmp_path / "model" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "model" / "labels.txt").write_text("cat")
    assert optpipe.load(tmp_path)(numbers(1, 4)).shape == (1, 2)


def test_an_engine_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deploy(Line(), task_of(torch.randn(4, 4)), tmp_path, "onnx", "openvino")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(OptpipeError, match=r'openvino is not installed here; pip install "optpipe\[openvino\]"'):
        optpipe.load(tmp_path)
