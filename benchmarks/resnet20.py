"""CIFAR-10 ResNet-20 in int8: our rows beside onnxruntime's, on the 1000 test images, one run."""

from __future__ import annotations

import images
import measure
import methods
import numpy as np

ROWS = {
    "resnet20-qexport-tensorrt-rtx": "**qexport int8, tensorrt-rtx**",
    "resnet20-qexport-tensorrt": "**qexport int8, tensorrt** (skip inputs too)",
    "resnet20-qexport-ort-cpu": "**qexport int8, ort-cpu**",
    "resnet20-ort-s8-minmax": "onnxruntime s8 MinMax",
    "resnet20-ort-s8-entropy": "onnxruntime s8 Entropy",
}
NOTE = (
    "CIFAR-10 ResNet-20, 1000 test images (the standard error of one accuracy is 0.9 points, so compare predictions), "
    "512 calibration images of the train split."
)


def main() -> None:
    """Run all methods and compare predictions with the float model's."""
    data = methods.RESNET / "test.npz"
    with np.load(data) as file:
        labels = file["labels"]
    source = methods.RESNET / "resnet20.onnx"
    truth = images.logits(source, data).argmax(1)
    size = source.stat().st_size
    rows = [row("fp32", truth, (truth, labels), {"bytes": size})]
    for name, title in ROWS.items():
        model, cost = methods.run(name)
        rows.append(row(title, images.logits(model, data).argmax(1), (truth, labels), cost))
    measure.report("resnet20", rows, NOTE)


def row(title: str, found: np.ndarray, known: tuple[np.ndarray, np.ndarray], cost: dict[str, float]) -> measure.Row:
    """One line of the table; ``known`` is the float model's predictions and the labels."""
    truth, labels = known
    engine = cost.get("engine_bytes")
    return {
        "": title,
        "top-1, %": f"{100 * (found == labels).mean():.1f}",
        "predictions unchanged, %": f"{100 * (found == truth).mean():.1f}",
        "calibrate + quantize, s": f"{cost['seconds']:.1f}" if "seconds" in cost else None,
        "file, kB": f"{cost['bytes'] / 1e3:.0f}",
        "engine, kB": f"{engine / 1e3:.0f}" if engine else None,
    }


if __name__ == "__main__":
    main()
