"""Seconds to make the report of a large run, its size, and seconds until its index can be used in a browser.

    python benchmarks/report.py [--neurons 8192] [--images 20000] [--candidates 200] [--side 320] [--keep DIR]

The run is made up (tests/report/synthetic.py): every living neuron has 20 radiographs, candidates 50, and
each radiograph is some neuron's. The pages are opened from disk in headless Chromium, three times, the index
until a search for a number has been answered; without Chromium or Playwright that part is left out.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

from medsae_ray.config import Settings
from medsae_ray.run import Run
from medsae_ray.stages.report import report

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "report"))
from synthetic import write_run


def main() -> None:
    """Make the run, then the report twice, then open it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--neurons", type=int, default=8192)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--candidates", type=int, default=200)
    parser.add_argument("--side", type=int, default=320, help="of the radiographs on disk, in pixels")
    parser.add_argument("--keep", help="folder that keeps the run (default: none)")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(chosen.keep or temporary) / "run"
        sizes = {"n_candidates": chosen.candidates, "side": chosen.side}
        run = write_run(folder, chosen.neurons, chosen.images, pictures="variants", **sizes)
        measure(run, folder)


def measure(run: Run, folder: Path) -> None:
    """Print what making and opening the report of a run costs."""
    started = time.perf_counter()
    done = report(run, Settings(run=str(folder)))
    seconds = time.perf_counter() - started
    assert done.ran
    started = time.perf_counter()
    assert not report(run, Settings(run=str(folder))).ran
    again = time.perf_counter() - started
    parts = done.manifest.notes["seconds"]
    files = [path for path in (folder / "report").rglob("*") if path.is_file()]
    size = {
        name: sum(path.stat().st_size for path in files if name in path.parts) / 2**20
        for name in ("radiographs", "data", "figures")
    }
    total = sum(path.stat().st_size for path in files) / 2**20
    n_rows, n_radiographs = run.read("gallery").num_rows, done.manifest.notes["radiographs"]
    print(f"{n_rows:,} rows of gallery, {n_radiographs:,} radiographs")
    print(f"report           {seconds:6.1f} s   (up to date: {again:.1f} s)")
    for part, of in {**parts, "commit and plan": seconds - sum(parts.values())}.items():
        print(f"  {part:<15}{of:6.1f} s")
    print(f"folder           {total:6.1f} MiB in {len(files):,} files")
    for name, of in size.items():
        print(f"  {name:<15}{of:6.1f} MiB")
    for page, seconds in opened(folder / "report").items():
        print(f"usable           {seconds:6.2f} s   {page}")


def opened(report_folder: Path) -> dict[str, float]:
    """Median seconds from opening a page from disk to its first answer."""
    chromium = shutil.which("chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        chromium = None
    if chromium is None:
        print("No Chromium or no Playwright here: the pages are not opened.")
        return {}
    seconds: dict[str, list[float]] = {"index, searched": [], "a neuron's card": []}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for _ in range(3):
            page = browser.new_page()
            started = time.perf_counter()
            page.goto((report_folder / "neurons.html").as_uri(), wait_until="commit")
            page.wait_for_selector("html[data-ready]")
            page.fill("#q", "42")
            page.wait_for_function("/^[1-9]\\d* of /.test(document.getElementById('count').textContent)")
            seconds["index, searched"].append(time.perf_counter() - started)
            page.close()
            page = browser.new_page()
            started = time.perf_counter()
            page.goto(f"{(report_folder / 'neuron.html').as_uri()}#7", wait_until="commit")
            page.wait_for_selector("html[data-ready]")
            seconds["a neuron's card"].append(time.perf_counter() - started)
            page.close()
        browser.close()
    return {name: sorted(of)[1] for name, of in seconds.items()}


if __name__ == "__main__":
    main()
