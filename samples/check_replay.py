"""Check the replay log of ``qexport certify`` with nothing but the models: check_replay.py LOG TARGET [DRAFT].

TARGET and DRAFT are model.onnx files. Every round is computed again from its whole prefix: both distributions, the
numbers of Philox, what was drafted, what was taken and what stands in its place. Shares no code with qexport.
"""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort

TOKEN, DRAFT, ACCEPT, RESIDUAL = range(4)
NEAR = 2e-4  # by which rounding in float32 may move a share or a score


def logits(session, ids, count):
    """Scores behind the last ``count`` tokens, all of them read at once."""
    feeds = {"input_ids": np.array([ids]), "position_ids": np.arange(len(ids))[None], "write_indices": np.zeros(1, int)}
    for port in session.get_inputs()[3:]:
        dtype = np.float16 if "float16" in port.type else np.float32
        feeds[port.name] = np.zeros((1, port.shape[1], len(ids), port.shape[3]), dtype)
    return session.run(["logits"], feeds)[0][0, -count:].astype(float)


def chances(scores, s, before):
    """What the settings make of scores, and how near that is to keeping a token more or less."""
    for token, bias in s["logit_bias"].items():
        scores[int(token)] += bias
    for token in set(before):
        scores[token] *= s["repetition_penalty"] ** -np.sign(scores[token])
    order = np.argsort(-scores, kind="stable")
    if s["temperature"] == 0:
        return np.eye(scores.size)[order[0]], scores[order[0]] - scores[order[1]]
    ranked = scores[order] / s["temperature"]
    p, edge = np.exp(ranked - ranked[0]), 1.0
    if 0 < s["top_k"] < scores.size and (gone := ranked < ranked[s["top_k"] - 1]).any():
        p[gone], edge = 0, ranked[~gone][-1] - ranked[gone][0]
    if s["top_p"] < 1:
        above = (np.cumsum(p) - p) / p.sum() - s["top_p"]
        p[above >= 0], edge = 0, min(edge, abs(above).min(), *-np.diff(ranked)[np.diff(above >= 0)])
    if s["min_p"] > 0:
        share = p / p[0] - s["min_p"]
        p[share < 0], edge = 0, min(edge, abs(share).min())
    return p[np.argsort(order)] / p.sum(), edge


def miss(p, number, token):
    """How far a number is from where the inverse of the distribution is that token."""
    below, number = p[:token].sum(), number * p.sum()
    return max(below - number, number - below - p[token])


def decisions(line, ids, key, s, models):
    """How far each decision is from what follows from the models (infinity where none does), and its edge."""
    proposed, tokens, taken = line["proposed"], line["tokens"], line["accepted"]
    sound = (line["position"], len(tokens), tokens[:taken]) == (len(ids), taken + 1, proposed[:taken])
    if not sound or taken > len(proposed) or (not line["drawn"] and tokens[taken:] == proposed[taken : taken + 1]):
        yield np.inf, 1.0
        return
    rows = [ids + proposed[:place] for place in range(len(proposed) + 1)]
    words = [np.random.Philox(key=key, counter=len(row)).random_raw(4) for row in rows]
    u = [(four >> np.uint64(11)) * 2.0**-53 for four in words]
    q = [chances(x, s, row) for x, row in zip(logits(models["target"], rows[-1], len(rows)), rows, strict=True)]
    wanted, drawn = [*proposed, line["spare"]], line["drawn"]
    if drawn or line["proposer"] == "draft":
        purpose = DRAFT if drawn else TOKEN
        p = [chances(x, s, row) for x, row in zip(logits(models["draft"], rows[-1], len(rows)), rows, strict=True)]
        yield from ((miss(p[i][0], u[i][purpose], x), p[i][1]) for i, x in enumerate(wanted) if x is not None)
    for i, (token, x) in enumerate(zip(tokens, wanted, strict=False)):
        if not drawn or x is None:
            yield miss(q[i][0], u[i][TOKEN], token), q[i][1]
            continue
        edge, over = min(p[i][1], q[i][1]), u[i][ACCEPT] * p[i][0][x] - q[i][0][x]
        took = i < taken or (i == len(proposed) and token == x)
        yield (over if took else -over), edge
        if not took:
            yield miss(np.maximum(q[i][0] - p[i][0], 0), u[i][RESIDUAL], token), edge


def demand(holds, what):
    """Leave with a reason."""
    if not holds:
        raise SystemExit(what)


def open_models(paths):
    """Sessions by name; onnxruntime warns of caches that are not written in place, which is meant here."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return {name: ort.InferenceSession(path, options) for name, path in paths.items()}


def check_files(header, paths):
    """Hold the models against the digests of the log."""
    for name, path in paths.items():
        for file, digest in header["files"].get(name, {}).items():
            found = hashlib.sha256((Path(path).parent / file).read_bytes()).hexdigest()
            demand(digest == f"sha256:{found}", f"{file} of the {name} is another file")


def check(log, paths):
    """Count decisions, those that only rounding explains, and those that nothing does."""
    models, counts = open_models(paths), {"decisions": 0, "near": 0, "wrong": 0}
    header, lines, rows = None, 0, []
    for told in map(json.loads, Path(log).read_text().splitlines()):
        if "schema" in told:
            demand(told["schema"] == "qexport.replay/1" and header is None, "another schema, or a run without an end")
            check_files(told, paths)
            header, lines, rows = told, 0, [list(row["prompt"]) for row in told["rows"]]
        elif "lines" in told:
            totals = [len(row["prompt"]) + row["tokens"] for row in header["rows"]]
            demand((told["lines"], totals) == (lines, list(map(len, rows))), "rounds are missing, or too many")
            header = None
        else:
            ids, key = rows[told["row"]], (header["sampling"]["seed"], header["rows"][told["row"]]["stream"])
            for off, edge in decisions(told, ids, key, header["sampling"], models):
                counts["decisions"] += 1
                counts["near"] += int(off > 1e-9 and min(off, edge) <= NEAR)
                counts["wrong"] += int(min(off, edge) > NEAR)
            rows[told["row"]], lines = ids + told["tokens"], lines + 1
    demand(header is None and counts["decisions"], "the log ends in the middle")
    return counts


if __name__ == "__main__":
    found = check(sys.argv[1], dict(zip(("target", "draft"), sys.argv[2:], strict=False)))
    print(json.dumps(found))
    sys.exit(1 if found["wrong"] else 0)
