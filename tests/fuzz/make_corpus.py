"""Write ``corpus/``: the bad and odd inputs of the tests, as the targets read them, and what fuzzing found.

``PYTHONPATH=tests python -m fuzz.make_corpus`` writes it anew; files of ``build/fuzz/keep/TARGET`` are taken along.
"""

from __future__ import annotations

import hashlib
import random
import shutil
from collections.abc import Iterator

import test_admit_files
import test_admit_graphs
import test_admit_numbers
import test_admit_sizes

from fuzz.run import BUILD, HERE
from qexport.exporter.recipe_files import list_recipes, load_recipe

LARGEST, MOST = 4096, 300_000
SCRIPTS = 16

RECIPES = (
    *("", "a = 1\na = 2\n", "[export]\ntarget = \n", 'name = "open\n', 'extends = "int8"\n', 'extends = "mine.toml"\n'),
    *('extends = "/etc/hostname"\n', '[[step]]\npass = "cleanup"\nsize_limit = 3\n', '[[step]]\npass = "claenup"\n'),
    *('[[step]]\npass = "quantize"\nmin_sqnr = nan\n', "[gates]\nmax_drop = inf\n", '[export]\nopset = "23"\n'),
    *("[data]\nimage = {mean = [0.5], std = [0]}\n", "[export.profiles]\nx = [[1], [2], [3]]\n", "a = " + "[" * 2000),
    *(".".join("a" * 2000) + " = 1", "a = " + "{a = " * 500, "a = 2020-01-01T00:00:00Z\n", 'name = "\\u202e\\u0000"\n'),
    *(
        "step = 3\n",
        "[[step]]\n",
        '[[step]]\npass = "smooth"\nalpha = 1e400\n',
        'name = """a\nb"""\n',
        "\ufeff[export]\n",
    ),
)
SETTINGS = (
    *(
        "smooth.alpha=0.6",
        "smooth.alhpa=0.6",
        "export.target=ort-cpu",
        "gates.max_drop=inf",
        "smooth.=1",
        "=",
        "a.b=[1",
    ),
    *("quantize.keep=['a', 'b']", "data.image={size=3}", "export.opset=1_0", "name=x", "calibrate.samples=0x10"),
    *('export.target="\\u0000"', "export.profiles.x=[[1],[2],[3]]", "step.pass=cleanup", "cleanup.enabled=false"),
)


def admitted() -> Iterator[bytes]:
    """Inputs of the target ``admit``."""
    for _, _, content, _ in test_admit_files.FILES:
        yield b"\0" + content
    models = [row[2] for row in test_admit_graphs.BAD]
    models += [row[1] for row in (*test_admit_graphs.GOOD, *test_admit_numbers.BAD, *test_admit_numbers.GOOD)]
    models += [row[1] for row in (*test_admit_sizes.BOMBS, *test_admit_sizes.SOUND)]
    for model in models:
        yield b"\0" + model.SerializeToString()
    for mode in range(1, 2 * SCRIPTS, 2):
        yield bytes([mode]) + random.Random(mode).randbytes(60)


def recipes() -> Iterator[bytes]:
    """Inputs of the target ``recipe``."""
    for text in RECIPES:
        yield b"\0" + text.encode()
    for name in list_recipes():
        yield b"\0" + load_recipe(name).to_toml().encode()
    for index, text in enumerate(SETTINGS):
        yield bytes([2 * index + 1]) + text.encode()


def main() -> None:
    """Write both folders anew."""
    for target, inputs in (("admit", admitted()), ("recipe", recipes())):
        folder = HERE / "corpus" / target
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        kept = [path.read_bytes() for path in sorted((BUILD / "keep" / target).glob("*"))]
        room = MOST // 2
        for data in sorted({*inputs, *kept}, key=len):
            room -= len(data)
            if len(data) <= LARGEST and room > 0:
                (folder / f"{hashlib.sha256(data).hexdigest()[:16]}.bin").write_bytes(data)


if __name__ == "__main__":
    main()
