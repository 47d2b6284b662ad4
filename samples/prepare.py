"""Cut the committed samples from the original files: ``python samples/prepare.py stsb|resnet20|decoder FOLDER``.

``stsb`` wants the folder with ``stsb-en-{train,dev,test}.csv`` and ``LICENSE`` of PhilipMay/stsb-multi-mt;
``resnet20`` the one with ``resnet20.onnx``, ``LICENSE.resnet``, ``train-512.npz`` and ``test-1000.npz``; ``decoder``
the one with the folders ``pair-target-hf``, ``stories260k-hf`` and ``text``. See README.md.
Running it again gives the same bytes, so the slices can be checked against their sources.
"""

from __future__ import annotations

import csv
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
CALIBRATION_SENTENCES = 512
TEXT_CHARACTERS = 64_000
DECODERS = {
    "pair-target-hf": "target",
    "pair-draft-hf": "draft",
    "stories260k-hf": "stories260k",
    "bitllama-3m-hf": "stories3m",
}
DECODER_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)


def read_rows(path: Path) -> list[list[str]]:
    """Rows of a CSV file without a header: sentence1, sentence2, score."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def write_rows(path: Path, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A CSV file with a header and Unix line ends."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def calibration_sentences(rows: Sequence[Sequence[str]], count: int, held_out: Iterable[str]) -> list[str]:
    """``count`` sentences: evenly spaced rows, sentence1 and sentence2 in turn, the next row for one already seen.

    A sentence counts as seen if it was chosen before or stands in ``held_out``, upper and lower case alike, because
    the tokenizer of the sample model makes no difference between them.
    """
    seen = {sentence.casefold() for sentence in held_out}
    chosen = []
    for i in range(count):
        row = i * len(rows) // count
        while rows[row][i % 2].casefold() in seen:
            row += 1
        chosen.append(rows[row][i % 2])
        seen.add(chosen[-1].casefold())
    return chosen


def prepare_stsb(source: Path) -> None:
    """512 sentences of the train split that the test split does not hold, dev and test whole, the licence."""
    test = read_rows(source / "stsb-en-test.csv")
    held_out = [sentence for row in test for sentence in row[:2]]
    sentences = calibration_sentences(read_rows(source / "stsb-en-train.csv"), CALIBRATION_SENTENCES, held_out)
    write_rows(HERE / "data/stsb-calibration.csv", ["sentence"], [[sentence] for sentence in sentences])
    header = ["sentence1", "sentence2", "score"]
    write_rows(HERE / "data/stsb-test.csv", header, test)
    write_rows(HERE / "data/stsb-dev.csv", header, read_rows(source / "stsb-en-dev.csv"))
    shutil.copyfile(source / "LICENSE", HERE / "data/STSB-LICENSE")


def prepare_resnet20(source: Path) -> None:
    """The network as it is; calibration images without labels; test images with labels."""
    for name, target in (("resnet20.onnx", "resnet20.onnx"), ("LICENSE.resnet", "LICENSE")):
        shutil.copyfile(source / name, HERE / "resnet20" / target)
    with np.load(source / "train-512.npz") as train:
        np.savez_compressed(HERE / "resnet20/calibration.npz", images=train["images"])
    with np.load(source / "test-1000.npz") as test:
        np.savez_compressed(HERE / "resnet20/test.npz", images=test["images"], labels=test["labels"])


def prepare_decoder(source: Path) -> None:
    """Both decoders as they are; the head of TinyStories' train split to calibrate, the tail of validation to judge."""
    for name, target in DECODERS.items():
        folder = HERE / "decoder" / target
        folder.mkdir(parents=True, exist_ok=True)
        for file in DECODER_FILES:
            shutil.copyfile(source / name / file, folder / file)
    train, validation = (
        (source / "text" / name).read_text(encoding="utf-8").split("\n\n")
        for name in ("tinystories.txt", "tinystories_val.txt")
    )
    write_text(HERE / "decoder/calibration.txt", paragraphs(train, TEXT_CHARACTERS))
    write_text(HERE / "decoder/heldout.txt", paragraphs(validation[::-1], TEXT_CHARACTERS)[::-1])


def paragraphs(candidates: Sequence[str], characters: int) -> list[str]:
    """The first paragraphs that have at most so many characters together, blank lines between them included."""
    sizes = np.cumsum([len(paragraph) + 2 for paragraph in candidates])
    return list(candidates[: int(np.searchsorted(sizes, characters, side="right"))])


def write_text(path: Path, lines: Sequence[str]) -> None:
    """Paragraphs with a blank line between them, Unix line ends."""
    path.write_text("\n\n".join(lines).strip() + "\n", encoding="utf-8", newline="\n")


def main(arguments: Sequence[str]) -> None:
    """``arguments``: what to prepare, and the folder with the original files."""
    makers = {"stsb": prepare_stsb, "resnet20": prepare_resnet20, "decoder": prepare_decoder}
    if len(arguments) != 2 or arguments[0] not in makers:
        raise SystemExit(__doc__)
    makers[arguments[0]](Path(arguments[1]))


if __name__ == "__main__":
    main(sys.argv[1:])
