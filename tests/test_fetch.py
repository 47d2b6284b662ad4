"""Fetching from a hub: what is taken, what is believed, who is told what; faults on the way are rows N01 to N03."""

from __future__ import annotations

import hashlib
import json
import os
import ssl
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request

import pytest
from faults import server
from faults.server import COMMIT, FILES, LATER, WEIGHTS
from helpers import call

from qexport.errors import IntegrityError, ModelInvalid, ResourceExhausted, UnsafeInput, UsageError
from qexport.exporter.hub import connection, download, patience
from qexport.exporter.hub.connection import Hub, Meter
from qexport.exporter.hub.fetch import fetch
from qexport.exporter.hub.listing import Listed, choose, parse_name, read_listing
from qexport.safe_io import Cache

POOLING = {"modules.json": b"[]", "1_Pooling/config.json": b"{}", "2_Dense/model.safetensors": b"12345678"}


@pytest.fixture(autouse=True)
def in_a_hurry(monkeypatch):
    for module, name in (
        (connection, "STALL"),
        (connection, "PAUSES"),
        (download, "PAUSES"),
        (download, "PIECE"),
    ):
        monkeypatch.setattr(module, name, getattr(module, name))  # put back at the end
    server.hurry()


@pytest.fixture
def hub():
    return Hub(server.hub().address)


@pytest.fixture
def model(request):
    """A model of this test alone, and its name."""
    found = server.hub().model(f"{hashlib.sha256(request.node.name.encode()).hexdigest()[:12]}/model")
    return found, next(name for name, each in server.hub().models.items() if each is found)


def names_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_model_comes_with_its_folders_and_nothing_else(tmp_path, hub, model):
    told, name = model
    told.files = {**FILES, **POOLING, "1_Pooling/code.py": b"", "3_x/../../x": b"", "onnx/model.onnx": b"", "a.pt": b""}
    found = fetch(name, tmp_path / "out", hub)
    taken = {*server.TAKEN, *POOLING}
    assert names_in(tmp_path / "out") == {*taken, "qexport.lock.json", "manifest.json"}
    assert all((tmp_path / "out" / each).read_bytes() == told.files[each] for each in taken)
    assert {file.name for file in found.pinned.files} == taken
    assert {each.path.partition(COMMIT + "/")[2] for each in told.asked[1:]} == taken  # not asked for either


def test_a_list_that_does_not_end_is_not_read_to_its_end(tmp_path, hub, model, monkeypatch):
    monkeypatch.setattr(connection, "_MOST_JSON", 1000)
    told, name = model
    told.files = {**FILES, **{f"{number}.json": b"" for number in range(100)}}
    with pytest.raises(ResourceExhausted, match="more than 1000 bytes"):
        fetch(name, tmp_path / "out", hub)
    assert not (tmp_path / "out").exists()


def test_what_is_there_already_is_not_asked_for_again(tmp_path, hub, model):
    told, name = model
    told.files |= POOLING
    fetch(name, tmp_path / "out", hub)
    before = len(told.asked)
    (tmp_path / "out/config.json").write_bytes(b"changed")
    found = fetch(name, tmp_path / "out", hub)
    assert [each.path.rpartition("/")[2] for each in told.asked[before + 1 :]] == ["config.json"]
    assert (tmp_path / "out/config.json").read_bytes() == FILES["config.json"]
    assert found.warnings == ()


def test_what_has_arrived_is_kept_until_all_has(tmp_path, hub, model):
    told, name = model
    cache = Cache(tmp_path / "cache")
    told.files["tokenizer.json"] = b"[]"
    kept = {file.name: file for file in read_listing(server.listed(told, COMMIT, git=False), "")[1]}
    first = cache.entry("fetch", f"{kept['model.safetensors'].digest}/000000")
    assert first.write(WEIGHTS[: server.PIECE])
    fetch(name, tmp_path / "out", hub, cache=cache)
    assert told.ranges() == [f"bytes={server.PIECE}-"]
    assert cache.entries() == ()


def test_a_kept_piece_that_is_another_one_is_thrown_away(tmp_path, hub, model):
    told, name = model
    cache = Cache(tmp_path / "cache")
    digest = hashlib.sha256(WEIGHTS).hexdigest()
    assert cache.entry("fetch", f"{digest}/000000").write(bytes(server.PIECE))
    fetch(name, tmp_path / "out", hub, cache=cache)
    assert told.ranges() == [f"bytes={server.PIECE}-", None]
    assert (tmp_path / "out/model.safetensors").read_bytes() == WEIGHTS


def test_a_file_over_several_pieces_needs_one_connection(tmp_path, hub, model):
    told, name = model
    fetch(name, tmp_path / "out", hub)
    assert len(WEIGHTS) > 4 * server.PIECE
    assert told.ranges() == [None]


# ---------------------------------------------------------------- the lock


def test_the_lock_pins_files_too(tmp_path, hub, model):
    told, name = model
    fetch(name, tmp_path / "out", hub)
    told.files["model.safetensors"] = server.flipped(WEIGHTS)
    with pytest.raises(IntegrityError, match=r"is not what qexport\.lock\.json says"):
        fetch(name, tmp_path / "out", hub)
    assert (tmp_path / "out/model.safetensors").read_bytes() == WEIGHTS
    fetch(name, tmp_path / "out", hub, update=True)
    assert (tmp_path / "out/model.safetensors").read_bytes() == told.files["model.safetensors"]


def test_another_revision_is_what_is_asked_for_and_not_what_is_locked(tmp_path, hub, model):
    told, name = model
    fetch(name, tmp_path / "out", hub)
    told.commit = LATER
    assert fetch(f"{name}@{COMMIT}", tmp_path / "out", hub).pinned.commit == COMMIT
    assert fetch(f"{name}@other", tmp_path / "out", hub).pinned.commit == LATER


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": "qexport.lock/2"}', "[" * 100_000])
def test_a_damaged_lock_is_told(tmp_path, hub, model, text):
    _, name = model
    fetch(name, tmp_path / "out", hub)
    (tmp_path / "out/qexport.lock.json").write_text(text)
    with pytest.raises(IntegrityError, match="the lock cannot be read"):
        fetch(name, tmp_path / "out", hub)


def test_a_hub_that_has_another_commit_than_was_asked_for_is_not_believed(tmp_path, monkeypatch, hub, model):
    _, name = model
    monkeypatch.setattr(hub, "json", lambda address: server.listed(server.Model(), LATER, git=False))
    with pytest.raises(IntegrityError, match=f"another commit than {COMMIT}"):
        fetch(f"{name}@{COMMIT}", tmp_path / "out", hub)


# ---------------------------------------------------------------- who is told what


def test_the_token_goes_to_the_hub_alone(tmp_path):
    told = server.hub().model("token/elsewhere")
    fetch("token/elsewhere", tmp_path / "out", Hub(server.hub().address, "secret"))
    here = {each.token for each in told.asked if each.host.startswith("127.0.0.1")}
    there = {each.token for each in told.asked if each.host.startswith("localhost")}
    assert (here, there) == ({"Bearer secret"}, {None})


def test_the_token_goes_along_where_the_hub_leads_to_itself(monkeypatch, tmp_path):
    monkeypatch.setitem(server.BEHAVIOURS, "renamed", server.lead(lambda ask: ask.path.replace(COMMIT, "other-place")))
    told = server.hub().model("token/renamed")
    fetch("token/renamed", tmp_path / "out", Hub(server.hub().address, "secret"))
    assert any("other-place" in each.path for each in told.asked)
    assert {each.token for each in told.asked} == {"Bearer secret"}


ENDPOINTS = ["https://hub.example", "https://hub.example:8443/mirror/", "http://127.0.0.1:80", "http://[::1]:80"]


@pytest.mark.parametrize("endpoint", [*ENDPOINTS, "http://localhost"])
def test_an_endpoint_is_encrypted_or_here(endpoint):
    Hub(endpoint)


@pytest.mark.parametrize(
    "endpoint",
    [
        *(
            None,
            "",
            "hub.example",
            "http://hub.example",
            "http://127.0.0.1.example",
            "file:///etc",
            "ftp://hub.example",
        ),
        *("https://", "https://me:secret@hub.example", "https://hub.example?x", "https://hub.example:x", "http://[::1"),
    ],
)
def test_other_endpoints_are_refused_without_showing_what_may_be_secret(endpoint):
    with pytest.raises(UsageError, match="HF_ENDPOINT") as refused:
        Hub(endpoint)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("to", ["http://hub.example/x", "http://127.0.0.1/x", "ftp://hub.example/x", "https:///x"])
def test_what_is_encrypted_stays_so(to):
    handler = next(
        each for each in Hub("https://hub.example")._opener.handlers if isinstance(each, connection._Redirects)
    )
    with open(os.devnull, "rb") as body, pytest.raises(IntegrityError, match="not encrypted"):
        handler.redirect_request(Request("https://hub.example/x"), body, 302, "", {}, f"{to}?signature=s")


@pytest.mark.parametrize(
    ("cause", "kind", "text"),
    [
        (ssl.SSLCertVerificationError("self-signed"), IntegrityError, "not who it says"),
        (TimeoutError(), ResourceExhausted, "no answer for"),
    ],
)
def test_no_answer_is_told_for_what_it_is(cause, kind, text):
    found = connection._failed(URLError(cause), "/x")
    assert isinstance(found, kind)
    assert text in str(found)


def test_nobody_at_the_other_end_is_told_after_three_tries(tmp_path):
    with pytest.raises(ResourceExhausted, match=r"cannot be asked.*refused"):
        fetch("a/b", tmp_path / "out", Hub("http://127.0.0.1:1"))
    assert os.listdir(tmp_path) == []


def test_a_server_is_left_alone_for_as_long_as_it_asks(tmp_path, hub, monkeypatch):
    slept = []
    monkeypatch.setattr(connection.time, "sleep", slept.append)
    fetch("patient/overloaded_shortly", tmp_path / "out", hub)
    assert slept == [7.0]
    with pytest.raises(ResourceExhausted, match=r"answers 429, and wants to be left alone for 5 minutes.*what has arr"):
        fetch("patient/overloaded_for_long", tmp_path / "long", hub)
    assert slept == [7.0]
    assert len(server.hub().model("patient/overloaded_for_long").ranges()) == 1


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"Retry-After": " 120 "}, 120.0),
        ({"Retry-After": "Thu, 01 Jan 1970 00:01:40 GMT"}, 90.0),
        ({"Retry-After": "Thu, 01 Jan 1970 00:01:40 -0000"}, 90.0),
        ({"Retry-After": "Thu, 01 Jan 1970 00:00:01 GMT"}, 0.0),
        ({"Retry-After": "-5"}, None),
        ({"Retry-After": "soon"}, None),
        ({"Retry-After": "1e9"}, None),
        ({"Retry-After": "9" * 400}, None),
        ({"RateLimit": '"api";r=0;t=55'}, 55.0),
        ({"RateLimit": '"api";r=3;t=55'}, None),
        ({"RateLimit": '"pages";r=9;t=200, "api"; r=0; t=55'}, 55.0),
    ],
    ids=str,
)
def test_how_long_a_server_wants_to_be_left_alone(monkeypatch, headers, seconds):
    monkeypatch.setattr(patience.time, "time", lambda: 10.0)
    assert patience.asked_pause(headers) == seconds


def test_pauses_are_told_in_words():
    assert [patience.words(each) for each in (7, 300, 86400)] == ["7 s", "5 minutes", "24 hours"]


def test_slowness_is_bytes_by_seconds_over_a_while(monkeypatch):
    monkeypatch.setattr(connection, "STALL", 30.0)
    meter = Meter()
    for size, seconds in ((10, 29.0), (1 << 20, 2.0), (1024 * 31, 30.5), (1000, 30.0)):
        meter.count(size, seconds, "")
    with pytest.raises(ResourceExhausted, match="too slow"):
        meter.count(1000, 1.0, "")


# ---------------------------------------------------------------- lists and names


def listed(*names: str) -> tuple[Listed, ...]:
    return tuple(Listed(name, 1, "0" * 64) for name in names)


SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"


def test_weights_are_one_file_or_the_shards_with_their_index():
    both = listed("config.json", INDEX, *SHARDS, "model.safetensors", "model.fp16.safetensors")
    assert [file.name for file in choose(both, "")] == ["config.json", "model.safetensors"]
    assert [file.name for file in choose(both[:4], "")] == ["config.json", INDEX, *SHARDS]


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (("model.safetensors",), ModelInvalid),
        (("config.json",), ModelInvalid),
        (("config.json", *SHARDS), ModelInvalid),
        (("config.json", "pytorch_model-00001-of-00002.bin"), UnsafeInput),
        (("config.json", "model.fp16.safetensors", "x.pt"), UnsafeInput),
    ],
)
def test_a_model_without_weights_that_may_be_read_is_refused(names, kind):
    with pytest.raises(kind):
        choose(listed(*names), "")


GOOD = {"rfilename": "a", "size": 1, "blobId": "0" * 40}


@pytest.mark.parametrize(
    "told",
    [None, [], {}, {"sha": COMMIT}, {"sha": "main", "siblings": []}, {"sha": COMMIT, "siblings": [GOOD, GOOD]}]
    + [{"sha": COMMIT, "siblings": [{**GOOD, **bad}]} for bad in ({"size": -1}, {"size": "1"}, {"blobId": "0" * 64})]
    + [
        {"sha": COMMIT, "siblings": [{**GOOD, **bad}]}
        for bad in ({"rfilename": 1}, {"lfs": {"size": 1, "sha256": "0"}})
    ]
    + [{"sha": 1, "siblings": []}, {"sha": COMMIT, "siblings": [1]}, {"sha": COMMIT, "siblings": [{**GOOD, "lfs": 1}]}],
)
def test_a_list_that_makes_no_sense_is_told(told):
    with pytest.raises(IntegrityError, match="makes no sense"):
        read_listing(told, "a/b")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a/b", ("a/b", "main")), ("gpt2@v1.0", ("gpt2", "v1.0")), ("a/b-c.d@refs/pr/1", ("a/b-c.d", "refs/pr/1"))],
)
def test_a_name_is_a_model_and_a_revision(text, expected):
    assert parse_name(text) == expected


@pytest.mark.parametrize(
    "text", ["", "a/b/c", "../a", "a/..", "a/b@", "a/b@../x", "a b", "a/b?x", "a/b@x y", "@x", "/a"]
)
def test_other_names_are_refused(text):
    with pytest.raises(UsageError, match="no name of a model"):
        parse_name(text)


def test_the_command_tells_files_and_commit(tmp_path, capsys, monkeypatch, model):
    _, name = model
    monkeypatch.setenv("HF_ENDPOINT", server.hub().address)
    code, out, _ = call(capsys, "fetch", name, "-o", str(tmp_path / "out"), "--no-cache", "--json")
    told = json.loads(out)
    assert (code, told["schema"], told["commit"]) == (0, "qexport.fetch/1", COMMIT)
    assert set(told["files"]) == set(server.TAKEN)
    assert "can move" in told["warnings"][0]
    monkeypatch.delenv("HF_ENDPOINT")
    code, _, err = call(capsys, "fetch", name, "-o", str(tmp_path / "other"), "--no-cache")
    assert code == 2
    assert "hint: set HF_ENDPOINT" in err
