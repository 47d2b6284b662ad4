"""Models pruned in torch, in the interpreter that has it: ``python benchmarks/torch_peer.py FOLDER``.

Reads ``FOLDER/asked.json`` and ``FOLDER/ROW/model.onnx``, writes ``FOLDER/ROW.torch`` and prints what it found as one
JSON object. Needs numpy, torch, transformers and onnx, and shares no code with qexport. From a pruned file it takes
which units stayed, told by weights that no repair touches: each of their rows must be, to the bit, one of the uncut
model. Everything else is made from the uncut model's weights.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch_models import Classifier, Encoder, inside, read_by

Stored = dict[str, NDArray[Any]]  # weight of a product or convolution, by the name of its node
Facts = dict[str, Any]
CHUNK = 16  # outputs that are fitted together
SHARES = (0.25, 0.5, 1.0)  # how far a repair of layers may go


def main(place: Path) -> None:
    """Make all rows that were asked for."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_grad_enabled(False)
    asked = json.loads((place / "asked.json").read_text(encoding="utf-8"))
    rows = {}
    for name, job in asked["rows"].items():
        start = time.perf_counter()
        subject = SUBJECTS[job["model"]](asked)
        found = stored(place / name / "model.onnx")
        facts: Facts = {"units": []}
        for step in job["steps"]:
            told = STEPS[step](subject, found, asked["ridge"] if job["repair"] else None)
            facts = {**told, "units": facts["units"] + told["units"]}
        subject.answers().numpy().astype(np.float32).tofile(place / f"{name}.torch")
        rows[name] = facts | {"seconds": time.perf_counter() - start}
    version = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(json.dumps({"version": version, "rows": rows}))


def stored(path: Path) -> Stored:
    """The weights of a file, in the order of its nodes."""
    graph = onnx.load(path).graph
    held = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    nodes = (node for node in graph.node if node.op_type in ("Conv", "MatMul") and node.input[1] in held)
    return {node.name: held[node.input[1]] for node in nodes}


def kept(whole: Tensor, found: NDArray[Any], name: str) -> list[int]:
    """Which rows of a weight are left, told by their numbers."""
    places = {row.tobytes(): place for place, row in enumerate(whole.numpy())}
    rows = [places.get(row.tobytes(), -1) for row in found]
    if -1 in rows or rows != sorted(set(rows)) or len(places) < len(whole):
        raise SystemExit(f"{name}: the rows are not some of the uncut model's, in their order")
    return rows


def narrowed(layer: nn.Module, rows: Sequence[int]) -> None:
    """Leave some outputs of a layer."""
    assert isinstance(layer.bias, Tensor)
    assert isinstance(layer.weight, Tensor)
    layer.weight, layer.bias = nn.Parameter(layer.weight[rows]), nn.Parameter(layer.bias[rows])


def taken_out(layer: nn.Module, stay: Sequence[int], rows: Tensor | None, ridge: float = 0.0) -> None:
    """Leave some inputs of a layer, given what it reads so that the rest makes up for them.

    With X centred, P what goes and S what stays, D minimizes ``|X_P W_P - X_S D|^2 + d |D|^2``, d the ridge times the
    mean square of a column of X, and is added to W_S; the mean of what is lost goes into the bias.
    """
    assert isinstance(layer.bias, Tensor)
    assert isinstance(layer.weight, Tensor)
    shape = layer.weight.shape
    whole = layer.weight.double().flatten(1).T
    per = whole.shape[0] // shape[1]
    inputs = torch.tensor([unit * per + place for unit in stay for place in range(per)])
    left = whole[inputs]
    if rows is not None:
        mean = rows.mean(0)
        centred = rows - mean
        gone = torch.ones(len(whole), dtype=torch.bool).index_fill(0, inputs, value=False)
        damp = damping(centred.square().sum(0), ridge)
        lost = torch.cat([centred[:, gone] @ whole[gone], torch.zeros(len(inputs), whole.shape[1]).double()])
        basis = torch.cat([centred[:, inputs], damp.sqrt() * torch.eye(len(inputs)).double()])
        left = left + torch.linalg.lstsq(basis, lost, driver="gels").solution
        layer.bias = nn.Parameter((layer.bias + mean @ whole - mean[inputs] @ left).float())
    layer.weight = nn.Parameter(left.T.reshape(shape[0], len(stay), *shape[2:]).float())


def damping(squares: Tensor, ridge: float) -> Tensor:
    """What a ridge adds; inputs that are never on do not count."""
    return ridge * squares[squares > 0].mean()


# ---------------------------------------------------------------- steps


def heads(encoder: Encoder, found: Stored, ridge: float | None) -> Facts:
    """Cut heads, layer by layer."""
    units = []
    for number, layer in enumerate(encoder.layers):
        part, reader = layer.attention.self, layer.attention.output.dense
        name, width = f"encoder.layer.{number}.attention.self", part.attention_head_size
        sides = {side: getattr(part, side) for side in ("query", "key", "value")}
        rows = [kept(side.weight, found[f"{name}.{key}/MatMul"].T, name) for key, side in sides.items()]
        whole = [unit * width + place for unit in sorted({row // width for row in rows[0]}) for place in range(width)]
        if any(some != whole for some in rows):
            raise SystemExit(f"{name}: queries, keys and values are not those of whole heads")
        if len(whole) == reader.in_features:
            continue
        read = None if ridge is None else read_by([reader], encoder.run)[0]
        for side in sides.values():
            narrowed(side, whole)
        taken_out(reader, whole, read, ridge or 0)
        units.append([len(whole) // width, part.num_attention_heads])
    return {"units": units}


def neurons(encoder: Encoder, found: Stored, ridge: float | None) -> Facts:
    """Cut neurons, layer by layer."""
    pairs = [
        (f"encoder.layer.{i}.intermediate.dense/MatMul", part.intermediate.dense, part.output.dense)
        for i, part in enumerate(encoder.layers)
    ]
    return {"units": [pair_cut(pair, found[pair[0]].T, encoder.run, ridge) for pair in pairs]}


def channels(classifier: Classifier, found: Stored, ridge: float | None) -> Facts:
    """Cut the channels between the two convolutions of a block, block by block."""
    if ridge is None:
        return everywhere(classifier, found)
    units = []
    for stage, block in np.ndindex(3, 3):
        names = [inside(stage + 1, block, place) for place in (1, 2)]
        first, second = (classifier.convolutions[name] for name in names)
        if len(found[names[1]]) != second.out_channels or found[names[0]].shape[1] != first.in_channels:
            raise SystemExit(f"{names[1]}: channels of a residual sum went, which is not written here")
        if len(found[names[0]]) < first.out_channels:
            units.append(pair_cut((names[0], first, second), found[names[0]], classifier.run, ridge))
    return {"units": units}


def everywhere(classifier: Classifier, found: Stored) -> Facts:
    """Cut the channels of the residual sums as well, from the first convolution to the last layer, without repair."""
    units = []
    stem = classifier.convolutions["/conv1/Conv"]
    stay = kept(stem.weight, found["/conv1/Conv"], "/conv1/Conv")
    narrowed(stem, stay)
    for stage, block in np.ndindex(3, 3):
        before = stay
        for place in (1, 2):
            name = inside(stage + 1, block, place)
            layer = classifier.convolutions[name]
            count = layer.out_channels
            taken_out(layer, stay, None)
            stay = kept(layer.weight, found[name], name)
            narrowed(layer, stay)
            if place == 1 and len(stay) < count:
                units.append([len(stay), count])
        if block == 0 and stage:
            side = classifier.added[stage + 1][0]
            if [unit - side for unit in stay if side <= unit < count - side] != before:
                raise SystemExit(f"{name}: other channels than those of the stage before it")
            classifier.added[stage + 1] = sum(unit < side for unit in stay), sum(unit >= count - side for unit in stay)
            units += [[len(stay), count]] * (stage == 2 and len(stay) < count)
    weight, bias = classifier.linear
    classifier.linear = weight[:, stay], bias
    return {"units": units}


def pair_cut(
    pair: tuple[str, nn.Module, nn.Module], found: NDArray[Any], run: Callable[[], None], ridge: float | None
) -> list[int]:
    """Cut what one layer makes and another reads."""
    name, maker, reader = pair
    assert isinstance(maker.weight, Tensor)
    count = len(maker.weight)
    rows = kept(maker.weight, found, name)
    read = None if ridge is None else read_by([reader], run)[0]
    narrowed(maker, rows)
    taken_out(reader, rows, read, ridge or 0)
    return [len(rows), count]


def sparsify(encoder: Encoder, found: Stored, ridge: float | None) -> Facts:
    """Zeros where the file has them, and how many of them its own Wanda scores would have elsewhere."""
    linears = encoder.linears()
    other = whole = 0
    for layer, rows, name in zip(linears.values(), read_by(linears.values(), encoder.run), linears, strict=True):
        mask = torch.from_numpy(found[name].T != 0)
        if mask.all():
            continue
        if not bool((mask.reshape(len(mask), -1, 4).sum(2) == 2).all()):
            raise SystemExit(f"{name}: not two zeros in every four inputs")
        weight, gram = layer.weight.double(), rows.T @ rows
        scores = (weight.abs() * gram.diagonal().sqrt()).reshape(len(mask), -1, 4)
        own = torch.zeros_like(scores).scatter(2, scores.topk(2).indices, 1.0).reshape(mask.shape) > 0
        other, whole = other + int((own != mask).sum()), whole + mask.numel()
        left = weight * mask
        if ridge is not None:
            gram += damping(gram.diagonal(), ridge) * torch.eye(len(gram)).double()
            lost = (weight - left) @ gram
            for start in range(0, len(mask), CHUNK):
                place = mask[start : start + CHUNK].nonzero()[:, 1].reshape(-1, mask.shape[1] // 2)
                system = gram[place[:, :, None], place[:, None, :]]
                more = torch.linalg.solve(system, lost[start : start + CHUNK].gather(1, place))
                left[start : start + CHUNK].scatter_add_(1, place, more)
        layer.weight = nn.Parameter(left.float())
    return {"units": [], "mask": [other, whole]}


# ---------------------------------------------------------------- layers


def layers(encoder: Encoder, found: Stored, ridge: float | None) -> Facts:
    """Remove the layers that turn what they read the least, one by one, until as many are left as in the file."""
    queries = [numbers for name, numbers in found.items() if name.endswith("attention.self.query/MatMul")]
    whole = list(encoder.layers)
    stayed = [next(i for i, part in enumerate(whole) if np.array_equal(part.attention.self.query.weight, rows.T))
              for rows in queries]  # fmt: skip
    truth = [states(encoder, feeds) for feeds in encoder.few]
    left, means = list(range(len(whole))), {}
    while len(left) > len(stayed):
        now = [states(encoder, feeds) for feeds in encoder.few]
        turns = [turn([(state[place], state[place + 1]) for state in now]) for place in range(len(left))]
        place = int(np.argmin(turns))
        target = means.pop(left[place], left[place])
        norm = whole[left[place - 1]].output.LayerNorm if place else encoder.model.embeddings.LayerNorm
        left.pop(place)
        encoder.model.encoder.layer = nn.ModuleList([whole[i] for i in left])
        if ridge is not None:
            repair(
                encoder, norm, [(some[place], all_[target + 1]) for some, all_ in zip(now, truth, strict=True)], truth
            )
        means[left[place - 1] if place else -1] = target
    if left != stayed:
        raise SystemExit(f"layers {left} turn the most, the file has {stayed}")
    return {"units": [[0, 1]] * (len(whole) - len(stayed))}


def states(encoder: Encoder, feeds: Mapping[str, Tensor]) -> list[Tensor]:
    """What the embeddings make, then what every layer makes, ``[positions, hidden]``."""
    made = encoder.model(**feeds, output_hidden_states=True)
    return [state[0].double() for state in made.hidden_states]


def turn(pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    """One minus the mean cosine between what a layer reads and makes."""
    return 1 - float(torch.cat([functional.cosine_similarity(*pair, dim=-1) for pair in pairs]).mean())


def repair(
    encoder: Encoder, norm: nn.LayerNorm, pairs: Sequence[tuple[Tensor, Tensor]], truth: Sequence[list[Tensor]]
) -> None:
    """A line or an offset for each channel, and a share of it, if it holds on the half that it was not fitted to."""
    plain = norm.weight.double(), norm.bias.double()
    trials = [None, *((share, scaled) for share in SHARES for scaled in (True, False))]
    halves = slice(0, None, 2), slice(1, None, 2)

    def set_to(trial: tuple[float, bool] | None, some: Sequence[tuple[Tensor, Tensor]]) -> None:
        weight, bias = plain
        if trial is not None:
            scale, offset = line(some, trial[1])
            scale, offset = 1 + trial[0] * (scale - 1), trial[0] * offset
            weight, bias = weight * scale, bias * scale + offset
        norm.weight, norm.bias = nn.Parameter(weight.float()), nn.Parameter(bias.float())

    def missed(trial: tuple[float, bool] | None, one: slice, other: slice) -> float:
        set_to(trial, pairs[one])
        return distance([states(encoder, feeds)[-1] for feeds in encoder.few[other]], [s[-1] for s in truth[other]])

    best = min(trials, key=lambda trial: missed(trial, *halves))
    gained = best is not None and missed(best, *reversed(halves)) < missed(None, *reversed(halves))
    set_to(best if gained else None, pairs)


def line(pairs: Sequence[tuple[Tensor, Tensor]], scaled: bool) -> tuple[Tensor, Tensor]:
    """The least-squares line of each channel, or its offset alone."""
    x, y = (torch.cat(side) for side in zip(*pairs, strict=True))
    spread = (x - x.mean(0)).square().sum(0)
    scale = ((x - x.mean(0)) * (y - y.mean(0))).sum(0) / spread if scaled else torch.ones_like(spread)
    return scale, y.mean(0) - scale * x.mean(0)


def distance(found: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """How far hidden states and embeddings are from the uncut model's, as a share of them."""
    shares = []
    for view in (lambda state: state, lambda state: functional.normalize(state.mean(0), dim=0)):
        gaps = sum(float((view(one) - view(two)).square().sum()) for one, two in zip(found, truth, strict=True))
        shares.append(gaps / sum(float(view(two).square().sum()) for two in truth))
    return float(np.sqrt(np.mean(shares)))


SUBJECTS: dict[str, Callable[[Mapping[str, Any]], Any]] = {"minilm": Encoder, "resnet20": Classifier}
STEPS: dict[str, Callable[..., Facts]] = {
    "heads": heads,
    "neurons": neurons,
    "channels": channels,
    "sparsify": sparsify,
    "layers": layers,
}

if __name__ == "__main__":
    main(Path(sys.argv[1]))
