"""From tokens to text that may be shown, and where it ends."""

from __future__ import annotations

from functools import lru_cache

import pytest
from conftest import ROOT
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qexport.errors import UsageError
from qexport.runtime.generation.detokenizing import MOST_HELD, Alphabet, Detokenizer
from qexport.runtime.generation.replies import Copied, Reply, Tally
from qexport.runtime.generation.stops import Cutter, Stop
from qexport.runtime.speculation.proposal import Proposal, Row, Span
from qexport.runtime.speculation.rounds import Outcome
from qexport.runtime.tokenizing import Tokenizer

BYTE_LEVEL, SPACED = "target", "stories3m"  # one of each kind: bytes in every token, and spaces before words
MADE = settings(max_examples=150, deadline=None)
KINDS = pytest.mark.parametrize("kind", [BYTE_LEVEL, SPACED])


@lru_cache
def alphabet(kind):
    return Alphabet(tokenizer(kind))


@lru_cache
def tokenizer(kind):
    return Tokenizer.load(ROOT / "samples/decoder" / kind)


@lru_cache
def bytes_of(kind):
    """Tokens of single bytes, which alone are no text."""
    names = {token: tokenizer(kind).inner.id_to_token(token) for token in range(tokenizer(kind).size)}
    return [token for token, name in names.items() if name.startswith("<0x") or len(name) == 1]


def tokens_of(kind, most=24):
    """Any tokens, many of them bytes, and some that the tokenizer does not have."""
    one = st.one_of(st.sampled_from(bytes_of(kind)), st.integers(0, tokenizer(kind).size + 2))
    return st.lists(one, max_size=most)


def text_between(kind, prompt, ids):
    """Decoded together, and what the prompt gives alone taken off."""
    base, whole = (tokenizer(kind).decode(part) for part in (prompt, [*prompt, *ids]))
    same = 0
    while same < min(len(base), len(whole)) and base[same] == whole[same]:
        same += 1
    return whole[same:]


def demand_text(kind, prompt, ids):
    found, text, told = Detokenizer(alphabet(kind), prompt), text_between(kind, prompt, ids), ""
    for token in ids:
        told += found.push(token)
        assert text.startswith(told)
    assert told + found.tail == text


# ---------------------------------------------------------------- text


@MADE
@given(tokens_of(BYTE_LEVEL), tokens_of(BYTE_LEVEL, 6))
def test_pieces_of_bytes_are_the_text_of_all_tokens(ids, prompt):
    demand_text(BYTE_LEVEL, prompt, ids)


@MADE
@given(tokens_of(SPACED), tokens_of(SPACED, 6))
@example([4, 198, 172, 258], [])  # a character that a later byte makes no text
@example([2, 403, 407], [])
@example([403, 2, 407, 410, 403], [1])  # a special token and a space alone, behind which words keep their space
def test_pieces_of_words_with_spaces_are_the_text_of_all_tokens(ids, prompt):
    demand_text(SPACED, prompt, ids)


@KINDS
@MADE
@given(data=st.data(), text=st.text(st.sampled_from("ab \n.é中😀\u200d🇩🇪ß"), max_size=20))
def test_no_piece_shows_half_a_character(kind, data, text):
    ids = tokenizer(kind).encode(f"a {text}", special=False)
    cut = data.draw(st.integers(1, len(ids)))
    found, told = Detokenizer(alphabet(kind), ids[:cut]), tokenizer(kind).decode(ids[:cut]).rstrip("\ufffd")
    for token in ids[cut:]:
        told += found.push(token)
        assert f"a {text}".startswith(told)
    assert told + found.tail in (f"a {text}", told)


@KINDS
def test_the_space_between_prompt_and_output_is_there(kind):
    prompt, ids = (tokenizer(kind).encode(text, special=False) for text in ("Once upon", " a time"))
    if kind == SPACED:
        ids = ids[1:]  # it always puts a space before
    found = Detokenizer(alphabet(kind), prompt)
    assert "".join(map(found.push, ids)) == " a time"


@KINDS
def test_letters_are_shown_at_once(kind):
    found = Detokenizer(alphabet(kind), tokenizer(kind).encode("The"))
    for token in tokenizer(kind).encode(" cat sat on the mat.", special=False):
        assert found.push(token) == text_between(kind, tokenizer(kind).encode("The"), [token])


def test_bytes_that_are_no_text_are_not_kept_back_for_ever():
    found, ids = Detokenizer(alphabet(SPACED)), [258] * (2 * MOST_HELD + 9)
    assert "".join(map(found.push, ids)) + found.tail == "\ufffd" * len(ids)
    assert len(found.tail) <= MOST_HELD


# ---------------------------------------------------------------- stop strings


def cut_plainly(pieces, strings):
    """The text up to where the first string begins, once the pieces have one; and how many pieces that takes."""
    for count in range(1, len(pieces) + 1):
        text = "".join(pieces[:count])
        places = [place for one in strings if (place := text.find(one)) >= 0]
        if places:
            return text[: min(places)], count
    return "".join(pieces), None


SHORT = st.text(st.sampled_from("ab"), min_size=1, max_size=4)


@MADE
@given(st.lists(st.text(st.sampled_from("abc"), max_size=3), max_size=12), st.lists(SHORT, max_size=3))
@example(["a", "b"], ["ab", "b"])
@example(["aab", "a"], ["aba", "b"])
def test_text_ends_where_the_first_string_begins(pieces, strings):
    cutter, told, ended = Cutter(strings), "", None
    text, expected = cut_plainly(pieces, strings)
    for count, piece in enumerate(pieces, 1):
        shown, stopped = cutter.push(piece)
        told += shown
        assert text.startswith(told)
        if stopped:
            ended = count
            break
        held = "".join(pieces[:count])[len(told) :]
        assert not held or any(one.startswith(held) for one in strings)  # nothing is kept back without a reason
    assert ended == expected
    assert told + cutter.finish() == text


def test_text_that_may_change_stops_only_if_it_is_the_end():
    cutter = Cutter(["\n"])
    assert cutter.push("a", "\ufffd") == ("a", False)
    assert cutter.push("b", "\n") == ("b", True)


# ---------------------------------------------------------------- replies


def reply(kind=BYTE_LEVEL, prompt=(0,), room=100, ends=(), strings=()):
    return Reply(0, Row(list(prompt), len(prompt)), room, ends, Detokenizer(alphabet(kind), prompt), Cutter(strings))


def answered(found, ids, sizes):
    """The same tokens in runs of these sizes, all but the last of each accepted."""
    start = 0
    for size in sizes:
        run = tuple(ids[start : start + size])
        if run and found.reason is None:
            found.take(Outcome(run, Proposal(run[:-1], proposer="draft"), len(run) - 1))
        start += size
    return found.completion()


@KINDS
@MADE
@given(data=st.data())
def test_an_output_ends_at_the_same_token_however_long_runs_are(kind, data):
    ids = [token for token in data.draw(tokens_of(kind)) if token != 0]
    text = text_between(kind, [0], ids)
    pick = st.integers(0, max(len(text) - 1, 0)).flatmap(lambda at: st.integers(1, 5).map(lambda n: text[at : at + n]))
    strings = [one for one in data.draw(st.lists(pick, max_size=2)) if one and "\ufffd" not in one]
    room = data.draw(st.integers(1, 30))
    ends = data.draw(st.sets(st.sampled_from(ids or [0]), max_size=1))
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=len(ids) + 1, max_size=len(ids) + 1))
    found = answered(reply(kind, room=room, ends=ends, strings=strings), [*ids, 0] * room, [*sizes, *[1] * room])

    expected, end, shown = [], None, ""
    for token in ([*ids, 0] * room)[:room]:
        expected.append(token)
        if token in ends:
            end = "stop"
            break
        shown = text_between(kind, [0], expected)
        cuts = [place for one in strings if (place := shown.find(one)) >= 0]
        if cuts:
            end, shown = "stop", shown[: min(cuts)]
            break
    assert found.tokens == tuple(expected)
    assert found.text == shown
    assert found.reason == (end or "length")


def test_tokens_say_where_they_were_copied_from():
    found = reply()
    copy = Proposal((300, 301, 302), proposer="reference", span=Span("a.txt", 40))
    found.take(Outcome((299,)), prompt=True)
    found.take(Outcome((300, 301, 302, 303), copy, 3))
    found.take(Outcome((300, 305), Proposal((300, 301), proposer="lookup", span=Span("", 7)), 1))
    found.take(Outcome((301, 0), Proposal((301,), proposer="lookup", span=Span("", 8)), 1))
    assert [(token.proposer, token.span) for token in found.tokens[:3]] == [
        ("", None),
        ("reference", Span("a.txt", 40)),
        ("reference", Span("a.txt", 41)),
    ]
    assert [token.accepted for token in found.tokens] == [False, True, True, True, False, True, False, True, False]
    found.reason = "stop"
    pieces = (Copied(1, 3, Span("a.txt", 40)), Copied(5, 1, Span("", 7)), Copied(7, 1, Span("", 8)))
    assert found.completion().copied == pieces
    assert found.completion().tally == Tally(calls=3, proposed=6, accepted=5)


def test_copies_that_go_on_are_one_piece():
    found = reply()
    found.take(Outcome((300, 301), Proposal((300, 301), span=Span("a", 4), proposer="x"), 2))
    found.take(Outcome((302,), Proposal((302,), span=Span("a", 6), proposer="x"), 1))
    found.reason = "stop"
    assert found.completion().copied == (Copied(0, 3, Span("a", 4)),)


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"tokens": 0}, "at most 0 tokens are asked for"),
        ({"strings": ("",)}, "a stop string has 0 characters"),
        ({"strings": ("x" * 1025,)}, "a stop string has 1025 characters"),
        ({"strings": "stop"}, "stop strings are one string"),
        ({"strings": ("x",) * 5000}, "5000 stop strings are given, expected 64 or fewer"),
        ({"ids": range(5000)}, "5000 stop ids are given, expected 1024 or fewer"),
        ({"ids": (3, -1)}, "a stop id is -1"),
        ({"ids": (1.5,)}, "a stop id is 1.5"),
        ({"ids": 5}, "stop ids are a int"),
        ({"tokens": 2.5}, "at most 2.5 tokens"),
        ({"tokens": float("nan")}, "at most nan tokens"),
        ({"tokens": "3"}, "at most '3' tokens"),
        ({"strings": None}, "stop strings are a NoneType"),
        ({"strings": (b"a",)}, "a stop string is b'a', expected text"),
        ({"strings": ("a", None)}, "a stop string is None, expected text"),
        ({"strings": ("a\ud800",)}, "ud800' is not Unicode"),
        ({"strings": ("a\ufffd",)}, "stands for what is no text"),
    ],
)
def test_stops_that_cannot_be_are_refused(asked, said):
    with pytest.raises(UsageError, match=said):
        Stop(**asked)
