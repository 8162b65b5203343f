"""Photograph report.html: docs/report_light.png, report_dark.png and report_narrow.png.

    python docs/screenshots.py outputs/runs/<time> [FOLDER [all]]

Needs `pip install selenium`, Chromium and its chromedriver. FOLDER, by default this one, gets the pictures: the first
part of the page, or the whole of it with `all`. Exits with 1 if the page is wider than a narrow screen, or asks for
anything outside itself.
"""

from __future__ import annotations

import base64
import shutil
import sys
from pathlib import Path
from typing import Any

SHOTS = {"light": (1180, "light", 1), "dark": (1180, "dark", 1), "narrow": (390, "light", 2)}  # width, scheme, scale
HEIGHT_LIMIT = {"light": 2400, "dark": 1500, "narrow": 2000}  # pixels of the page that a picture shows


def main(run: Path, folder: Path, whole: bool) -> int:
    """Take the pictures; 1 if the page is at fault."""
    browser, faults = _browser(), []
    try:
        for name, (width, scheme, scale) in SHOTS.items():
            _emulate(browser, width, scheme, scale)
            browser.get((run / "report.html").resolve().as_uri())
            overflow = browser.execute_script("return document.documentElement.scrollWidth - window.innerWidth")
            asked = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
            faults += [f"{name}: the page is {overflow} pixels wider than the screen"] if overflow > 0 else []
            faults += [f"{name}: the page asks for {url}" for url in asked if not url.startswith("data:")]
            height = browser.execute_script("return document.documentElement.scrollHeight")
            path = folder / f"report_{name}.png"
            path.write_bytes(_picture(browser, width, height if whole else min(height, HEIGHT_LIMIT[name])))
            print(f"{path}: {width} pixels wide, {scheme}")
    finally:
        browser.quit()
    print("\n".join(faults), file=sys.stderr)
    return 1 if faults else 0


def _browser() -> Any:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(argument)
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or ""
    return webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))


def _emulate(browser: Any, width: int, scheme: str, scale: int) -> None:
    metrics = {"width": width, "height": 900, "deviceScaleFactor": scale, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def _picture(browser: Any, width: int, height: int) -> bytes:
    clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
    shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"clip": clip, "captureBeyondViewport": True})
    return base64.b64decode(shot["data"])


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    given = [*sys.argv[1:], str(Path(__file__).parent)]
    sys.exit(main(Path(given[0]), Path(given[1]), whole="all" in given[2:]))
