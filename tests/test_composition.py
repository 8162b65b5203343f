"""What a command line composes to, and what is said of one that cannot run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from optpipe import compose
from optpipe.command import read
from optpipe.errors import RecipeError
from optpipe.plan import Choice

EDGE = "+recipe=edge_int8"


def plans(*words: str):
    command = read(words)
    compose.prepare(command)
    return compose.check(command)


def problems(*words: str) -> str:
    with pytest.raises(RecipeError) as error:
        plans(*words)
    return str(error.value)


@pytest.mark.parametrize("recipe", compose.builtin_recipes())
def test_every_recipe_composes_and_opens_with_what_it_produces(recipe: str) -> None:
    text = (compose.CONF / "recipe" / f"{recipe}.yaml").read_text()
    if recipe.startswith("gpu") and not torch.cuda.is_available():
        assert "torch finds no GPU here" in problems(f"+recipe={recipe}")
    else:
        goal = ["goal.speedup=2"] if "\ngoal:" in text else []
        assert all(plan.entries for plan in plans(f"+recipe={recipe}", *goal))
    assert "# Produces:" in text and f"+recipe={recipe}" in text


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], ["no recipe is given", "+recipe=edge_int8"]),
        (["+recipe=edge_int4"], ["no recipe 'edge_int4'", "did you mean 'edge_int8'?"]),
        ([EDGE, "prune.rato=0.3"], ["'prune.rato=0.3'", "Channels", "no setting 'rato'", "did you mean 'ratio'?"]),
        ([EDGE, "prune.ratio=1.2"], ["prune: ratio is 1.2; it must be at least 0 and below 1"]),
        ([EDGE, "prune.ratio=much"], ["prune.ratio=much", "'much'", "Float"]),
        ([EDGE, "quantize=statc"], ["no quantize 'statc'", "did you mean 'static'?"]),
        ([EDGE, "quantise=static"], ["quantise", "did you mean 'quantize'?"]),
        ([EDGE, "quantize.observer=best"], ["observer", "minmax", "histogram"]),
        ([EDGE, "+prune_more=channels"], ["did you mean '+prune@prune_more=channels'?"]),
        ([EDGE, "+nonsense=1"], ["there is no setting 'nonsense'"]),
        ([EDGE, "sed=1"], ["sed", "did you mean 'seed'?"]),
        ([EDGE, "seed=one"], ["seed is 'one'; it must be of type int"]),
        ([EDGE, "device=gpu"], ["device is 'gpu'", "cuda"]),
        ([EDGE, "target.threads=0"], ["target: threads is 0; it must be at least 1"]),
        ([EDGE, "distill.student_args={width:64}"], ["no 'width' yet; add it as '+distill.student_args={width:64}'"]),
        ([EDGE, "+target.options.spining=false"], ["onnxruntime has no option 'spining'", "did you mean 'spinning'?"]),
        ([EDGE, "target.options={spinning:false}"], ["add it as '+target.options={spinning:false}'"]),
        ([EDGE, "+target.options.graph_level=most"], ["graph_level is 'most'; it must be one of off, basic"]),
        ([EDGE, "target.device=cuda:77"], ["target.device is 'cuda:77', but"]),
        ([EDGE, "target.device=gpu"], ["it must be cpu, cuda or cuda:<number>"]),
        ([EDGE, "export=openvino"], ["ends with an OpenVINO IR, which target.runtime=onnxruntime does not run"]),
        ([EDGE, "benchmark.runtimes=[onxruntime]"], ["runtimes names 'onxruntime'; did you mean 'onnxruntime'?"]),
        ([EDGE, "target.runtime=onxruntime"], ["target.runtime is 'onxruntime'", "did you mean 'onnxruntime'?"]),
        (
            [EDGE, "quantize.placement=inductor", "quantize.weights=per_tensor"],
            ["quantize: placement=inductor", "per channel"],
        ),
        ([EDGE, "quantize.placement=tensorrt"], ["placement", "onnxruntime", "openvino", "inductor", "xnnpack"]),
        ([EDGE, "target.instruction_set=avx1024"], ["instruction_set", "avx512_vnni"]),
        ([EDGE, "budget.quality_drop=-1"], ["budget: quality_drop is -1"]),
        ([EDGE, "measure.replicas=0"], ["measure: replicas is 0"]),
        ([EDGE, "pipeline=[prune,quantise]"], ["pipeline names 'quantise'", "did you mean 'quantize'?"]),
        ([EDGE, "pipeline=[]"], ["pipeline is empty"]),
        ([EDGE, "pipeline=[prune,prune]"], ["names 'prune' twice", "+prune@prune_again="]),
        (
            [EDGE, "pipeline=[trace,export,prune]"],
            ["step 'prune' takes a torch module, but step 'export' before it gives an ONNX file", "move 'prune'"],
        ),
        (
            [EDGE, "pipeline=[quantize,export]"],
            [
                "step 'export' takes an exported program, but step 'quantize' before it gives a torch",
                "such as trace/program",
            ],
        ),
        ([EDGE, "pipeline=[{all_of:[prune,quantize]}]"], ["all_of", "first_of", "best_of"]),
        ([EDGE, "model.path=net.onnx"], ["model.format is torch; choose model=onnx or model=program"]),
        (
            [EDGE, "model=onnx", f"model.path={__file__}", "model.weights=w.pt", "pipeline=[benchmark]"],
            ["model.weights means nothing; leave it out"],
        ),
        (
            [EDGE, "+target.options.providers=[NoSuchProvider]"],
            ["has no provider 'NoSuchProvider'", "CPUExecutionProvider"],
        ),
        ([EDGE, "model.factory=no_such_package.net"], ["model.factory", "no_such_package"]),
        ([EDGE, "model.weights=no_such_file.pt"], ["model.weights is 'no_such_file.pt', which is not a file"]),
        ([EDGE, "plugins=[no_such_plugin]"], ["plugins names 'no_such_plugin'", "cannot be imported"]),
        ([EDGE, "--config-dir", "no_such_folder"], ["--config-dir is 'no_such_folder', which is not a folder"]),
        ([EDGE, "prune.ratio=["], ["prune.ratio=["]),
        ([EDGE, "+prune.foo=1"], ["prune", "no setting 'foo'"]),
        ([EDGE, "prune=null"], ["leave its key out of pipeline"]),
    ],
)
def test_a_mistake_is_named_with_its_remedy(words: list[str], expected: list[str]) -> None:
    text = problems(*words)
    for part in expected:
        assert part in text


def test_a_runtime_that_is_not_installed_is_told_before_the_run(monkeypatch) -> None:
    monkeypatch.setattr(compose.checked, "missing", lambda name: True)
    assert 'not installed here; pip install "optpipe[openvino]"' in problems(EDGE, "target.runtime=openvino")


def test_all_problems_are_reported_together() -> None:
    text = problems(EDGE, "prune.rato=0.3", "quantize=statc", "nonsense=1", "distill.epochs=many")
    for part in ("4 problems", "rato", "statc", "nonsense", "many"):
        assert part in text


def test_problems_of_values_are_reported_together_too() -> None:
    text = problems(EDGE, "prune.ratio=2", "distill.alpha=7", "seed=x", "pipeline=[prune,distill,quantise]")
    for part in ("4 problems", "ratio is 2", "alpha is 7", "seed is 'x'", "'quantise'"):
        assert part in text


def test_every_value_of_a_sweep_is_checked() -> None:
    text = problems("--multirun", EDGE, "prune.ratio=0.3,1.5", "quantize=static,statc")
    assert "ratio is 1.5" in text and "statc" in text


def test_overrides_may_follow_flags() -> None:
    command = read(["--config-dir", "somewhere", EDGE, "--multirun", "seed=1,2"])
    assert command.argv() == [EDGE, "seed=1,2", "--config-dir", "somewhere", "--multirun"]
    assert command.config_dir == Path("somewhere") and command.is_sweep


def test_a_family_runs_twice_under_another_key() -> None:
    (plan,) = plans(
        EDGE, "+prune@prune_more=channels", "prune_more.ratio=0.2", "pipeline=[prune,distill,prune_more,trace,export]"
    )
    assert [entry.key for entry in plan.entries][2] == "prune_more"
    assert plan.entries[2].stage.ratio == 0.2 and plan.entries[0].stage.ratio == 0.7


def test_alternatives_compose_from_keys_and_branches() -> None:
    (plan,) = plans(EDGE, "pipeline=[{best_of:[[prune,quantize],quantize]},trace]")
    choice = plan.entries[0]
    assert isinstance(choice, Choice)
    assert [[step.key for step in branch] for branch in choice.branches] == [["prune", "quantize"], ["quantize"]]


def test_a_recipe_places_a_family_under_keys_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "recipe").mkdir()
    text = "# @package _global_\ndefaults: [/quantize@static: static, /quantize@careful: static_edge]\n"
    (tmp_path / "recipe" / "mine.yaml").write_text(f"{text}pipeline: [{{best_of: [static, careful]}}, trace, export]\n")
    words = ("+recipe=mine", f"--config-dir={tmp_path}", "static.observer=minmax")
    choice = plans(*words)[0].entries[0]
    assert isinstance(choice, Choice) and choice.key == "best_of_static_careful"
    assert [branch[0].stage.observer.value for branch in choice.branches] == ["minmax", "histogram"]
    text = problems(*words, "careful.observr=minmax")
    assert "careful" in text and "no setting 'observr'" in text


def test_a_broken_recipe_does_not_hide_a_broken_override(tmp_path: Path) -> None:
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "mine.yaml").write_text(
        "# @package _global_\ndefaults: [override /prune: chanels]\npipeline: [prune]\n"
    )
    said = problems("+recipe=mine", f"--config-dir={tmp_path}", "seeed=1", "prune.rato=0.5")
    assert "did you mean 'channels'" in said and "did you mean 'seed'" in said


def test_an_alternative_that_cannot_run_here_is_left_out_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("+export@export_engine=tensorrt", "+trace@trace_engine=program")
    choice = "{best_of:[[trace,export],[trace_engine,export_engine]]}"
    (plan,) = plans(EDGE, *words, f"pipeline=[{choice},benchmark]")
    ((method, reason),) = plan.entries[0].absent
    assert method == "trace_engine+export_engine" and "tensorrt" in reason and len(plan.entries[0].branches) == 1
    nothing = problems(EDGE, *words, "+export@other=tensorrt", "pipeline=[trace,{first_of:[export_engine,other]}]")
    assert nothing.count("needs tensorrt") == 1


def test_the_next_step_must_take_what_every_branch_gives() -> None:
    said = problems(EDGE, "pipeline=[{first_of:[quantize,trace]},trace]")
    assert "depending on the branch; it cannot take an exported program" in said


def test_a_user_file_named_like_a_built_in_is_refused(tmp_path: Path) -> None:
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "edge_int8.yaml").write_text("pipeline: [prune]\n")
    assert "has the name of a built-in file" in problems(EDGE, f"--config-dir={tmp_path}")


def test_composing_works_inside_another_hydra_application(tmp_path: Path) -> None:
    from hydra import compose as outer_compose
    from hydra import initialize_config_dir

    (tmp_path / "mine.yaml").write_text("a: 1\n")
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        assert plans(EDGE)
        assert outer_compose("mine").a == 1


@pytest.mark.parametrize("words", [["--help"], [EDGE, "prune.rato=0.3"], [EDGE, "dry_run=true"]])
def test_an_answer_that_needs_no_work_imports_nothing_heavy(words: list[str], tmp_path: Path) -> None:
    code = (
        "import sys, atexit; from optpipe.__main__ import main; sys.argv = ['optpipe', *sys.argv[1:]]\n"
        "heavy = {'torch', 'mlflow', 'onnx', 'sklearn'}\n"
        "atexit.register(lambda: print('heavy:', sorted(heavy & set(sys.modules))))\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=tmp_path, capture_output=True, text=True)
    assert "heavy: []" in done.stdout
    assert "Traceback" not in done.stderr


def test_dry_run_prints_the_plan_and_leaves_nothing(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "optpipe", EDGE, "dry_run=true"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0
    assert "7. benchmark (benchmark/latency)" in done.stdout and "program -> onnx" in done.stdout
    assert list(tmp_path.iterdir()) == []
