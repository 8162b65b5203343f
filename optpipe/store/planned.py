"""Which steps of a plan the store has, told by its configuration alone, so that nothing must be loaded to know.

Code and data are not looked at: a step that was changed since is computed all the same.
"""

from __future__ import annotations

from pathlib import Path

from optpipe.machine import user_cache
from optpipe.plan import Plan, Step
from optpipe.store import ENTRY, Key, Store

COMMON = ("model", "data", "target", "seed", "device")


def planned_key(plan: Plan, key: str) -> Key | None:
    """What stands for the result of the step `key`: the settings up to it. None where a choice comes before it."""
    settings: dict[str, object] = {}
    for entry in plan.entries:
        if not isinstance(entry, Step) or any(plan.config.get(name) is None for name in COMMON):
            return None
        settings[entry.key] = [entry.info.name, plan.config[entry.key]]
        if entry.key == key:
            return Key("plan", {name: plan.config[name] for name in COMMON} | {"steps": settings})
    return None


def kept(plan: Plan) -> set[str]:
    """The steps of `plan` whose results are there, unless code or data have changed since."""
    if not plan.store.enabled:
        return set()
    root = Path(plan.store.folder).expanduser() if plan.store.folder else user_cache() / "store"
    if not root.is_dir():
        return set()
    store, found = Store(root, plan.store.limit_gb), set()
    for entry in plan.entries:
        key = planned_key(plan, entry.key)
        place = store.get(key) if key else None
        if place is None or not (root / place["kind"] / place["digest"][:2] / place["digest"] / ENTRY).exists():
            break
        found.add(entry.key)
    return found
