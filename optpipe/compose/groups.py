"""The groups and settings of a configuration, and what each of them holds."""

from __future__ import annotations

from pathlib import Path

from optpipe import sources
from optpipe.budget import Budget
from optpipe.measure.settings import Measure
from optpipe.store import Settings as StoreSettings
from optpipe.target import Target
from optpipe.tracking import Tracking

_ROOT = Path(__file__).resolve().parents[1]
CONF = next(folder for folder in (_ROOT / "conf", _ROOT.parent / "conf") if (folder / "config.yaml").exists())

SCHEMAS: dict[str, type] = {
    "model": sources.Model,
    "data": sources.Data,
    "target": Target,
    "budget": Budget,
    "measure": Measure,
    "tracking": Tracking,
    "store": StoreSettings,
}
SETTINGS = {"pipeline", "seed", "device", "plugins", "rehearse", "dry_run", "relax", "goal"}


def builtin_recipes() -> list[str]:
    return sorted(path.stem for path in (CONF / "recipe").glob("*.yaml"))


def recipes(config_dir: Path | None) -> list[str]:
    """Every recipe that +recipe= can name."""
    own = [path.stem for path in (config_dir / "recipe").glob("*.yaml")] if config_dir else []
    return sorted({*builtin_recipes(), *own})
