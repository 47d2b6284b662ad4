"""The rows of the catalogue: what goes wrong, and what is right then. Cases are in the ``rows_*.py`` beside it."""

from __future__ import annotations

import importlib
from pathlib import Path

from faults.case import Case

ROWS = {
    "M01": "an empty file is 3",
    "M02": "a model cut anywhere is 3",
    "M03": "garbage, or a model with something behind it, is 3",
    "M04": "a file of another kind is 3 and named, a pickle is 4",
    "M05": "external data beside the folder: 4, never opened",
    "M06": "external data of an absolute path: 4, never opened",
    "M07": "external data out of the folder by a detour: 4, never opened",
    "M08": "external data behind a link: 4; a hub's blobs by digest",
    "M09": "external data in a folder behind a link: 4",
    "M10": "external data that has a second name: 4",
    "M11": "external data that is a FIFO, device or folder: 4 within a second",
    "M12": "external data that is swapped for a link 10 000 times: 0 or 4, nothing leaks",
    "M13": "offsets and lengths that are negative, huge or no numbers: 3",
    "M14": "external data that end too early: 3 with both numbers",
    "M15": "a length that is not that of the dimensions: 3 with both numbers",
    "M16": "10 000 tensors in one range: 0 or 9, memory bounded",
    "M17": "external data missing, spelt otherwise: 3; not readable: 9",
    "M18": "unknown keys and addresses of external data: 4",
    "M19": "external data hidden anywhere in the model: 4",
    "M20": "a tensor with too few or too many bytes: 3",
    "M21": "dimensions that overflow, are negative, or huge without data: 3, nothing allocated",
    "M22": "unknown types, data in two fields: 3",
    "M23": "a name that is written twice: 3",
    "M24": "circles and names that nothing writes: 3; wrong order: mended with a warning",
    "M25": "functions in a circle, nesting: 3; 20 deep is fine",
    "M26": "versions that are unknown, too old or missing: 3 with the range",
    "M27": "an unknown operator is 3, one of a foreign domain 6 and named",
    "M28": "NaN or infinite weights: 3 and listed; let through on request",
    "M29": "bad scales, zero points and axes: 3",
    "M30": "a quantized model that is quantized again: 2, or nothing changes",
    "M31": "hostile names: fine, and escaped wherever they are shown",
    "M32": "a small model that grows to 2^40 bytes: 9 before anything is allocated",
    "M33": "200 000 nodes: in near-linear time and 2 GB",
    "M34": "over 2 GB of weights: saved beside the model",
    "M35": "profiles that contradict each other or the model: 2 before the work",
    "M36": "shapes from data, loops, strings: left alone with a reason",
    "D01": "pickles in data: 4, not run",
    "D02": "data that claim more than they hold, or grow: 5 or 9, nothing allocated",
    "D03": "data cut or damaged: 5, or 11 by digest",
    "D04": "data of other names, shapes or types: 5 with both",
    "D05": "NaN in data is 5; data without a range: a warning, scales stay positive",
    "D06": "every sample is read, not the first one again",
    "D07": "int8 without data: 2, never random data",
    "D08": "data that change between passes: 11",
    "D09": "samples that fail at one: 5 at that one; that never end: capped",
    "D10": "samples in another order or split: the same scales",
    "D11": "tokenizer missing or of another vocabulary: 5 at the start",
    "K01": "a cache entry that is damaged, of another model or older: computed anew with a warning, or 11",
    "K02": "a timing cache that is damaged: built without it, the old one kept",
    "K03": "a cache that others can write: 4",
    "K04": "two builds of the same: one works, the other waits and takes its result",
    "K05": "a build that waits for one that is killed: goes on within 2 s",
    "K06": "a lock that is held too long is 10; a cache that cannot be written: a warning",
    "K07": "a full cache: the build ends well, without an entry",
    "F01": "a full disk at any file: 9, nothing half",
    "F02": "an output that is full, a folder, not writable, or an input: 9, 2, 9, 2",
    "F03": "killed at any point and run again: the same bytes, at most one stage redone",
    "F03b": "killed between weights and model: readers see the old or the new, never a mix",
    "F04": "SIGINT and SIGTERM: 130 and 143 within 2 s, work kept",
    "F05": "memory runs out: 9 with the peak and advice",
    "F06": "native code dies: 12 with a bundle",
    "F07": "native code hangs: 9, all of it gone",
    "F08": "descriptors or threads run out: 9",
    "F09": "interrupted, partial and failing writes: complete, or 9 and nothing published",
    "F10": "files have the mode that the umask says",
    "F11": "written over its own source: right bytes",
    "N01": "a download cut, stalled, failing, damaged or led astray: resumed or 11; 9 where it stalls",
    "N02": "a branch that moves: a warning, the lock pins the commit",
    "N03": "a model that wants its own code run: 4, nothing else is tried",
    "X01": "recipes with unknown or double keys, wrong types, circles: 2 with the place",
    "X02": "every pair of flags of every command is parsed",
    "X03": "poor locales, odd names, no home, no terminal: fine",
}

HERE = Path(__file__).parent


def cases() -> list[Case]:
    """All of them."""
    return [case for name in _present() for case in importlib.import_module(f"faults.{name}").CASES]


def known() -> dict[str, str]:
    """Id of each case that is known not to pass yet, to the reason: the ``KNOWN`` of the modules that have one."""
    found: dict[str, str] = {}
    for name in _present():
        found |= getattr(importlib.import_module(f"faults.{name}"), "KNOWN", {})
    return found


def _present() -> list[str]:
    return sorted(path.stem for path in HERE.glob("rows_*.py"))
