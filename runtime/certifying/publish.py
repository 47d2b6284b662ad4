"""The folder of a certificate: what was found, in numbers and in words, and every decision that it rests on."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from qexport.runtime.certifying.certify import Certified
from qexport.safe_io import finite, publish

CERTIFICATE, WORDS, LOG, MANIFEST = "certificate.json", "certificate.txt", "replay.jsonl", "manifest.json"
_SCHEMA = "qexport.manifest/1"


def publish_certificate(found: Certified, output: Path, inputs: Iterable[Path]) -> None:
    """Write the folder, also where checks fail, as that is when somebody will look.

    Args:
        found: What to write.
        output: The folder to make, or to replace where it holds an older certificate.
        inputs: Folders that were read.

    Raises:
        UsageError: The folder holds something else.
        ResourceExhausted: No space, no permission.
    """
    with publish(output, inputs=inputs) as stage:
        stage.write_json(CERTIFICATE, finite(found.certificate.document()))
        stage.write_text(WORDS, "\n".join(found.certificate.lines()) + "\n")
        stage.write_text(LOG, found.log())
        files = {name: {"bytes": size, "digest": digest} for name, (size, digest) in sorted(stage.files.items())}
        stage.write_json(MANIFEST, {"schema": _SCHEMA, "files": files})
