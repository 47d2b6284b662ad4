"""Models that are loaded once and decode for any number of requests, and which of them fit together."""

from __future__ import annotations

import threading
from functools import cached_property
from pathlib import Path

from qexport.errors import DataInvalid, ModelInvalid, QexportError, UsageError
from qexport.runtime.accounting.curve import Setting, profile_of
from qexport.runtime.accounting.machine import fingerprint
from qexport.runtime.accounting.profiles import Profile
from qexport.runtime.backends.artefact import MODEL
from qexport.runtime.backends.choose import open_session
from qexport.runtime.decoder import Decoder
from qexport.runtime.generation.folders import Folder, read_folder
from qexport.runtime.idle import Idle
from qexport.runtime.session import Session, SessionOptions
from qexport.runtime.signature import Signature, read_signature
from qexport.runtime.speculation.chains import Chains
from qexport.runtime.speculation.soundness import Soundness, measure_soundness

CPU = "ort-cpu"
GUESS = 0.1  # of a call with one token, for every one more
UNROLL_AFTER = 500  # rounds: each saves a tenth of a millisecond or two, and each number of tokens takes 50 to open
UNROLL_MOST = 16 << 20  # bytes of a graph, of which each number of tokens keeps a copy


class Model:
    """A decoder with its tokenizer; any number of threads may ask for decoders at once.

    Attributes:
        folder: Tokenizer and settings.
        signature: What the graph asks for.
        positions: Tokens that a row may have; ``None`` for no end.
        options: How it runs.
    """

    def __init__(self, path: Path, options: SessionOptions) -> None:
        """Load what ``export`` or ``build`` wrote.

        Args:
            path: The folder.
            options: How to run.

        Raises:
            UsageError: There is no such folder, or no export in it.
            UnsafeInput: There is no manifest.
            IntegrityError: A file is not the one that was published.
            ModelInvalid: The graph is not in the portable layout, or needs another model's output.
            DataInvalid: No tokenizer, or one that knows more tokens than the model.
            QexportError: As ``runtime.backends.choose.open_session``.
        """
        self.folder: Folder = read_folder(path)
        self.options = options
        self._drafted = 0  # rounds
        self._measuring = threading.Lock()
        self._idle: Idle[Decoder] = Idle(Decoder.close)
        self._session: Session | None = open_session(path, options)
        try:
            self.signature, self.positions = _examine(self._session, self.folder)
        except BaseException:
            self.close()
            raise

    def decoder(self) -> Decoder:
        """One more decoder with a state of its own; whoever asks for it closes it.

        Raises:
            UsageError: The model is closed.
        """
        return Decoder(self._opened())

    def take(self) -> Decoder:
        """A decoder, of which nothing is known but that a reset makes it new; whoever takes it gives it back.

        Raises:
            UsageError: The model is closed.
        """
        return self._idle.take() or self.decoder()

    def give_back(self, decoder: Decoder, *, sound: bool = True) -> None:
        """Keep it for the next one if it is sound and its buffers are small.

        Making buffers and binding them takes longer than a step of a small model does.
        """
        if sound and decoder.small and self._session is not None:
            self._idle.give(decoder)
        else:
            decoder.close()

    def profile(self) -> Profile | None:
        """What its calls take, as the folder says for this machine or as it is measured once, in less than a second.

        ``None`` where that cannot be told, as of a folder without the graph.
        """
        with self._measuring:
            return self._profile

    @cached_property
    def soundness(self) -> Soundness:
        """What the logits of a token depend on beside the tokens before it; measured once, by four calls."""
        with self.decoder() as decoder:
            return measure_soundness(decoder)

    def verifying(self, width: float) -> float:
        """t(S), milliseconds of a call with ``width`` tokens; a guess at its shape where there is no profile."""
        known = self.profile()
        return 1 + GUESS * (width - 1) if known is None else known.milliseconds(width)

    def drafting(self, ahead: float) -> float:
        """u(K), milliseconds of ``ahead`` tokens one after the other."""
        return ahead * self.verifying(1)

    def chains(self) -> Chains | None:
        """Its graph unrolled, several tokens in one call, once it has drafted enough to make up for opening that.

        ``None`` before, and for graphs that cannot be unrolled, that are large, or that no processor runs.
        """
        if self._drafted < UNROLL_AFTER:
            return None
        with self._measuring:
            return self._chains

    def note(self, rounds: int, *, failed: bool) -> None:
        """Remember that it has looked ahead for so many rounds, or that it cannot do so unrolled."""
        with self._measuring:
            self._drafted += rounds
            if failed:
                self._chains = None

    @cached_property
    def _chains(self) -> Chains | None:
        file = self.folder.path / MODEL
        if self._opened().backend != CPU or not file.is_file() or file.stat().st_size > UNROLL_MOST:
            return None
        try:
            return Chains(file, self.options)
        except QexportError:
            return None

    @cached_property
    def _profile(self) -> Profile | None:
        backend, options = self._opened().backend, self.options
        machine = fingerprint() if backend == CPU else fingerprint(f"GPU {options.device}", backend)
        with self.decoder() as decoder:
            try:
                return profile_of(self.folder.path, decoder, Setting(machine, options.threads))
            except QexportError:
                return None

    def close(self) -> None:
        """Free the model; a second time does nothing."""
        if self._session is not None:
            self._idle.close()
            self._session.close()
            chains = self.__dict__.pop("_chains", None)
            if chains is not None:
                chains.close()
        self._session = None

    def _opened(self) -> Session:
        if self._session is None:
            raise UsageError("the model is closed", where=str(self.folder.path))
        return self._session


def _examine(session: Session, folder: Folder) -> tuple[Signature, int | None]:
    """What a graph asks for and how long rows may be; raise what is wrong with it, or with its tokenizer."""
    where = str(folder.path)
    try:
        found = read_signature(session)
    except ModelInvalid as error:
        raise ModelInvalid(error.what, where=where, hint=error.hint) from error
    if found.context:
        what = f"it reads {', '.join(found.context)}, which another model gives"
        raise ModelInvalid(what, where=where, hint="text is generated by decoders alone")
    known, size = folder.tokenizer.size, found.vocabulary
    if known > size:
        what = f"the tokenizer knows {known} tokens, the model's logits are {size}"
        raise DataInvalid(what, where=where, hint="is it the tokenizer of this model?")
    beyond = [token for token in folder.ends if token >= size]
    if beyond:
        what = f"token {beyond[0]} is to end its texts, the model has a vocabulary of {size}"
        raise DataInvalid(what, where=where, hint="correct eos_token_id in generation_config.json and export it again")
    with Decoder(session) as decoder:
        return found, decoder.limit


def demand_pair(target: Model, draft: Model) -> None:
    """Refuse a draft whose tokens mean something else; how far vocabularies are padded does not matter.

    Raises:
        DataInvalid: With the first token that differs.
    """
    theirs, ours = draft.folder.tokenizer, target.folder.tokenizer
    if theirs.digest == ours.digest:
        return
    for token in range(max(theirs.size, ours.size)):
        one, other = ours.inner.id_to_token(token), theirs.inner.id_to_token(token)
        if one != other:
            break
    what = f"its tokenizer is not that of the target: token {token} is {_quoted(other)}, there {_quoted(one)}"
    hint = "a draft proposes tokens of the target: take one that was trained with the same tokenizer"
    raise DataInvalid(what, where=str(draft.folder.path), hint=hint)


def _quoted(name: str | None) -> str:
    return "nothing" if name is None else repr(name)
