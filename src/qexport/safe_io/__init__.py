"""The only place that opens, writes and publishes files.

Nothing is written in place: a file is written beside its final name, flushed to the disk and renamed; a folder is
staged beside its final name and exchanged in one step. Modes follow the umask. Names that come from a model are opened
component by component below a folder, so that no link can lead out of it.
"""

from qexport.safe_io.blobs import check_blob, demand_inside, open_companion
from qexport.safe_io.caches import Cache, Entry, Kept
from qexport.safe_io.points import EVENT
from qexport.safe_io.publishing import Stage, publish
from qexport.safe_io.reading import (
    digest_bytes,
    digest_file,
    of_one_version,
    open_beneath,
    open_file,
    read_bytes,
    read_text,
)
from qexport.safe_io.writing import finite, replace_file, write_bytes, write_json, write_text

__all__ = [
    "EVENT",
    "Cache",
    "Entry",
    "Kept",
    "Stage",
    "check_blob",
    "demand_inside",
    "digest_bytes",
    "digest_file",
    "finite",
    "of_one_version",
    "open_beneath",
    "open_companion",
    "open_file",
    "publish",
    "read_bytes",
    "read_text",
    "replace_file",
    "write_bytes",
    "write_json",
    "write_text",
]
