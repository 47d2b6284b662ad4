"""One scorer for the image classifier: CIFAR-10 images, normalized as ResNet-20 was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

MEAN = np.array([0.485, 0.456, 0.406], np.float32)
STD = np.array([0.229, 0.224, 0.225], np.float32)
BATCH = 64


def batches(path: Path) -> list[dict[str, NDArray[Any]]]:
    """Feeds of float32 [batch, 3, 32, 32] from the ``images`` of an npz file."""
    with np.load(path) as file:
        scaled = ((file["images"] / np.float32(255) - MEAN) / STD).transpose(0, 3, 1, 2)
    return [{"input": np.ascontiguousarray(scaled[i : i + BATCH])} for i in range(0, len(scaled), BATCH)]


def logits(model: Path, data: Path) -> NDArray[np.float32]:  # [images, classes]
    """Answers of a model, by onnxruntime with its default settings."""
    import onnxruntime as ort

    settings = ort.SessionOptions()
    settings.log_severity_level = 4
    session = ort.InferenceSession(model, settings, providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, feeds)[0] for feeds in batches(data)])
