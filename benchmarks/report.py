"""The report of MiniLM's build in headless Chromium: how large, how soon it is painted, what it asks for; its pictures.

Needs Chromium, which ``make browser`` installs; does nothing without.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import measure

import qexport
from qexport.exporter.report.files import load_report
from qexport.exporter.report.html.page import render

sys.path.append(str(measure.ROOT / "tests"))
import browser  # these two lie beside the tests, which share them
import report_trees

ROUNDS = 5
PICTURES = measure.ROOT / "docs/images"
NOTE = (
    f"First paint: from the start of the navigation to the first text, median and largest of {ROUNDS}, headless "
    "Chromium, a file on disk. Data: the Parquet files and report.json beside the page. Render: making the page of "
    "what is in these files. Of the build: what it takes to gather the report and make the page, in the time of the "
    "build with judging and latency, without a cache. Requests: of anything but the page itself. The last two rows are "
    "made up."
)


class Clock:
    """Seconds of the stages of a build, by their names."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        """Take the time of a stage, ``total`` units long."""
        start = time.perf_counter()
        yield lambda n=1: None
        self.seconds[name] = self.seconds.get(name, 0) + time.perf_counter() - start


def main() -> None:
    """Print the table and take the pictures."""
    binary = browser.find_chromium()
    if binary is None:
        print("there is no Chromium, so the report was not measured: run `make browser` once, as root")
        return
    measure.WORK.mkdir(parents=True, exist_ok=True)
    with browser.Browser(binary) as running:
        rows = [row(running, *page) for page in pages()]
        for name, dark in (("report", False), ("report-dark", True)):
            picture(running, measure.WORK / "report/report.html", PICTURES / f"{name}.png", dark=dark)
    measure.report("report", rows, NOTE)


def pages() -> Iterator[tuple[str, Path, float, int, str | None]]:
    """What it is, the page, seconds to render it, nodes, and the share of the report in the time of the build."""
    clock = Clock()
    built = build(clock)
    result, report = load_report(built)
    start = time.perf_counter()
    render(result, report)
    taken = time.perf_counter() - start
    share = f"{100 * (clock.seconds['report'] + taken) / result.seconds:.1f}"
    yield "all-MiniLM-L6-v2, int8", built / "report.html", taken, len(report.nodes), share
    for count in (2_000, 200_000):
        result, report = report_trees.large(count)
        path = measure.WORK / f"report-{count}.html"
        start = time.perf_counter()
        path.write_text(render(result, report), encoding="utf-8")
        yield f"{count} nodes", path, time.perf_counter() - start, count, None


def build(clock: Clock) -> Path:
    """Build MiniLM as ``make demo`` does, but for this machine's runtime; the page tells paths as they are given."""
    folder, model = measure.WORK / "report", measure.WORK / "all-MiniLM-L6-v2"
    model.unlink(missing_ok=True)
    model.symlink_to(measure.minilm_folder())
    data = Path("samples/data")
    with contextlib.chdir(measure.ROOT):
        qexport.build(
            model.relative_to(measure.ROOT),
            recipe="int8",
            calib=data / "stsb-calibration.csv",
            eval=data / "stsb-test.csv",
            target="ort-cpu",
            options=qexport.BuildOptions(output=folder.relative_to(measure.ROOT), progress=clock),
        )
    return folder


def row(running: browser.Browser, title: str, path: Path, seconds: float, nodes: int, share: str | None) -> measure.Row:
    """Open one page several times."""
    paints = []
    for _ in range(ROUNDS):
        with running.open(path) as page:
            paints.append(page.first_paint)
            page.settle()
            requests, console = len(page.requests) - 1, len(page.console)
    data = sum(file.stat().st_size for file in path.parent.glob("report*") if file.suffix in {".json", ".parquet"})
    return {
        "": title,
        "nodes": nodes,
        "page, MB": f"{path.stat().st_size / 1e6:.2f}",
        "data, MB": f"{data / 1e6:.2f}" if path.name == "report.html" else None,
        "render, s": f"{seconds:.2f}",
        "of the build, %": share,
        "first paint, s": f"{statistics.median(paints):.2f} ({max(paints):.2f})",
        "requests": requests,
        "console lines": console,
    }


def picture(running: browser.Browser, path: Path, to: Path, *, dark: bool) -> None:
    """Take what a reader sees first."""
    to.parent.mkdir(exist_ok=True)
    with running.open(path, dark=dark) as page:
        to.write_bytes(page.screenshot())


if __name__ == "__main__":
    main()
