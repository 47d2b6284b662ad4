from __future__ import annotations

import math

import pytest
from report_trees import replace_record, tiny

from qexport.exporter.outcome.result import OutputQuality, TaskScore
from qexport.exporter.report.verdict import verdict


def build(**changes):
    """The tiny build without gates, with other numbers."""
    result = replace_record(tiny()[0], gates=changes.pop("gates", {}))
    quality = changes.pop("quality", {})
    latency = changes.pop("latency", {})
    if quality is not None:
        task = TaskScore(name="spearman", reference=82.0, result=81.9, drop=0.1)
        found = {"cosine_worst": 0.97, "task": task, "outputs": {}, **quality}
        changes["quality"] = replace_record(result.quality, **found)
    else:
        changes["quality"] = None
    changes["latency"] = None if latency is None else replace_record(result.latency, **latency)
    return replace_record(result, **changes)


SLOWER = {"speedup": 0.5, "speedup_low": 0.45, "speedup_high": 0.6}
NOISE = {"speedup": 1.02, "speedup_low": 0.97, "speedup_high": 1.05}
LOST = TaskScore(name="spearman", reference=82.0, result=81.5, drop=0.5)
PERPLEXITY = {"name": "perplexity", "better": "lower", "reference": 20.0}


@pytest.mark.parametrize(
    ("changes", "word", "told"),
    [
        ({}, "better", "3.8 times smaller and 2.0 times faster"),
        ({"latency": NOISE}, "as good", "as fast within the noise"),
        ({"latency": None}, "as good", "its speed on ort-cpu was not measured"),
        ({"latency": {"foreign": True}}, "as good", "its speed on ort-cpu was not measured"),
        ({"latency": {"foreign": True, **SLOWER}}, "as good", "was not measured"),
        ({"latency": SLOWER}, "mixed", "3.8 times smaller, but 2.0 times slower"),
        ({"bytes_after": 100_000_000}, "mixed", "2.0 times faster, but 1.1 times larger"),
        ({"bytes_after": 90_800_000}, "as good", "and 2.0 times faster"),
        ({"quality": {"task": LOST}}, "worse", "loses 0.50 points of spearman on held-out data"),
        (
            {"quality": {"task": LOST}, "gates": {"max_drop": 1.0}},
            "mixed",
            "loses 0.50 points of spearman on held-out data, which its gates allow; it is 3.8",
        ),
        ({"quality": {"task": LOST}, "gates": {"max_drop": 0.4}}, "worse", "where 0.4 are allowed"),
        ({"quality": {"cosine_worst": 0.9}}, "worse", "is far from float on sample 412 (cosine 0.900)"),
        (
            {"quality": {"cosine_worst": 0.9}, "gates": {"min_cosine": 0.9}},
            "mixed",
            "(cosine 0.900) on held-out data, which its gates allow",
        ),
        (
            {"quality": {"task": LOST}, "latency": None},
            "worse",
            "3.8 times smaller; its speed on ort-cpu was not measured",
        ),
        ({"gates": {"max_drop": 1.0}}, "better", "as good as float on held-out data"),
        ({"quality": {"cosine_worst": math.nan}}, "worse", "is far from float"),
        ({"gates": {"min_cosine": 0.99}}, "worse", "a mean cosine of 0.9851 to float where 0.99 is asked"),
        ({"gates": {"min_worst_cosine": 0.98}}, "worse", "a sample with cosine 0.9700 where 0.98 is asked"),
        ({"quality": {"task": None}}, "better", "as good as float on held-out data"),
        ({"quality": {"held_out": False}}, "better", "on data of which calibration has seen some"),
        ({"quality": {"task": TaskScore(**PERPLEXITY, result=20.1, drop=0.1)}}, "better", "as good"),
        ({"quality": {"task": TaskScore(**PERPLEXITY, result=20.3, drop=0.3)}}, "worse", "raises perplexity by 0.30"),
        ({"quality": None}, "unmeasured", "3.8 times smaller and 2.0 times faster; how good it is was not measured"),
        ({"quality": None, "latency": None, "bytes_after": 90_900_000}, "unmeasured", "as large as before"),
    ],
)
def test_a_verdict_follows_from_what_was_measured(changes, word, told):
    found = verdict(build(**changes))
    assert found.word == word
    assert told in found.sentence
    assert found.sentence.endswith(".")
    assert found.facts


def test_the_worst_output_counts_and_not_the_main_one():
    other = OutputQuality(cosine_mean=0.99, cosine_worst=0.5, worst_sample=3, sqnr=9.0, max_error=1.0)
    assert verdict(build()).word == "better"
    assert verdict(build(quality={"outputs": {"other": other}})).word == "worse"


def test_the_facts_are_the_numbers_behind_the_word():
    facts = " / ".join(verdict(build(gates={"max_drop": 1.0})).facts)
    for told in ("spearman 82.00 → 81.90 (+0.10 lost, 1 allowed)", "worst 0.9700", "90.9 MB → 24 MB", "1.90 to 2.10"):
        assert told in facts
    assert "ms" not in " / ".join(verdict(build(latency={"foreign": True})).facts)
