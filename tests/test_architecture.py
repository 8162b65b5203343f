"""The imports point one way, and each library has one home."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FRAME = sorted((ROOT / "optpipe").rglob("*.py"))
PLUGINS = {f"optpipe/hydra_plugins/optpipe_{name}.py" for name in ("once", "parallel", "ray", "search")}
COMPOSE = {f"optpipe/compose/{name}.py" for name in ("__init__", "compositions", "jobs", "refusals", "sweeps")}
STAGES = sorted((ROOT / "stages").rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Every module that `path` imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def users_of(package: str, files: list[Path]) -> set[str]:
    return {
        str(path.relative_to(ROOT))
        for path in files
        if any(name == package or name.startswith(f"{package}.") for name in imported(path))
    }


def test_the_frame_knows_no_stage() -> None:
    assert users_of("optpipe.stages", FRAME) == set()
    assert users_of("stages", FRAME) == set()


@pytest.mark.parametrize(
    ("package", "homes"),
    [
        ("hydra", {"optpipe/__main__.py", "optpipe/registry.py"} | COMPOSE | PLUGINS),
        ("hydra.core.config_store", {"optpipe/registry.py"}),
        ("mlflow", {"optpipe/tracking/delivery.py"}),
        ("optuna", {"optpipe/search/space.py", "optpipe/search/study.py"}),
    ],
)
def test_a_library_has_one_home(package: str, homes: set[str]) -> None:
    assert users_of(package, FRAME + STAGES) == homes


def test_stages_see_neither_tracking_nor_the_loop() -> None:
    for module in ("optpipe.tracking", "optpipe.pipeline", "optpipe.compose", "optpipe.measure"):
        assert users_of(module, STAGES) == set()
