"""The sampler: pieces from pools, one cursor per pool, and the token windows cut from the stream they make.

The multi-domain mixture draws from pools with given labels (domains), CCDS from pools that were found (clusters, see
ccds.py). A cursor moves only when its own pool is drawn, so no piece is skipped and none is read twice.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from eopc_compiler.calibration.cutting import cut_lines
from eopc_compiler.calibration.domains import Domain, Split, document_id, mixture_shares
from eopc_runtime.errors import UsageError

_CHARS_PER_TOKEN = 6  # generous, so that a piece of text usually fills at least one window


class Tokenizer(Protocol):
    """Anything that turns text into token ids without adding special tokens."""

    def encode(self, text: str) -> list[int]: ...


class Batch(NamedTuple):
    """Some windows of one domain, for statistics of a mixture."""

    domain: int  # its place in the mixture
    weight: float  # of one token; summed over all tokens of the set, 1
    tokens: torch.Tensor  # int64 [n, seq_len]


def by_domain(batches: Sequence[Batch], values: Sequence[torch.Tensor]) -> dict[int, torch.Tensor]:
    """Values [n, ...] of every batch's windows, those of a domain below each other."""
    domains = sorted({b.domain for b in batches})
    return {d: torch.cat([x for b, x in zip(batches, values, strict=True) if b.domain == d]) for d in domains}


def domain_means(batches: Sequence[Batch], losses: Sequence[torch.Tensor]) -> dict[int, float]:
    """Mean loss by domain."""
    return {d: float(x.double().mean()) for d, x in by_domain(batches, losses).items()}


@dataclass(frozen=True)
class CalibrationSet:
    """Token windows per domain, all from one split; no special tokens inside the windows.

    `weights` are the shares alpha_k of the domains in the mixture, in their order, summing to 1; left out, uniform.
    """

    domains: tuple[tuple[str, torch.Tensor], ...]  # (name, int64 [n_seq, seq_len])
    split: str = "calibration"
    seed: int = 0
    weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        weights = self.weights or (1.0,) * len(self.domains)
        if len(weights) != len(self.domains):
            raise ValueError(f"{len(weights)} weights for {len(self.domains)} domains")
        shares = mixture_shares([Domain(name, (), w) for (name, _), w in zip(self.domains, weights, strict=True)])
        object.__setattr__(self, "weights", shares)

    @property
    def names(self) -> tuple[str, ...]:
        """Domain names in order."""
        return tuple(name for name, _ in self.domains)

    @property
    def mixture(self) -> tuple[tuple[str, float, torch.Tensor], ...]:
        """(name, alpha, int64 [n_seq, seq_len]) per domain: what statistics of a mixture are summed over."""
        return tuple((name, w, windows) for (name, windows), w in zip(self.domains, self.weights, strict=True))

    def batches(self, size: int = 8, most: int | None = None) -> list[Batch]:
        """The windows in batches of one domain each, at most `most` windows of a domain."""
        rows = [(i, w, windows[:most]) for i, (_, w, windows) in enumerate(self.mixture)]
        return [Batch(i, w / t.numel(), part) for i, w, t in rows if len(t) for part in torch.split(t, size)]

    @property
    def tokens(self) -> torch.Tensor:
        """All windows below each other, [sum of n_seq, seq_len]."""
        return torch.cat([windows for _, windows in self.domains])

    @property
    def fingerprint(self) -> str:
        """SHA-256 over names, weights, shapes and token ids."""
        digest = hashlib.sha256()
        for name, weight, windows in self.mixture:
            digest.update(f"{name}\0{weight!r}\0{tuple(windows.shape)}\0".encode())
            digest.update(windows.contiguous().numpy().tobytes())
        return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of one document."""

    pool: str
    document: str  # SHA-256
    text: str


@dataclass(frozen=True, slots=True)
class Pool:
    """Pieces under one label, in the order in which they are read."""

    name: str
    pieces: tuple[Piece, ...]
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class SequenceRecord:
    """Where the tokens of one window come from: pools and documents of its pieces in order."""

    pools: tuple[str, ...]
    documents: tuple[str, ...]  # SHA-256
    piece_tokens: tuple[int, ...]  # of each piece, inside this window
    tokens: int


@dataclass(frozen=True, slots=True)
class Windows:
    """Token windows cut from a stream of pieces."""

    tokens: torch.Tensor  # int64 [count, seq_len]
    records: tuple[SequenceRecord, ...]
    pieces: tuple[Piece, ...]  # that were read
    stream_tokens: int  # in them


def build_calibration(
    tokenizer: Tokenizer,
    domains: Sequence[Domain],
    n_seq: int,
    seq_len: int,
    seed: int = 0,
    split: Split = "calibration",
    *,
    allow_fewer: bool = False,
) -> CalibrationSet:
    """Cut on average `n_seq` windows of `seq_len` tokens per domain from one split, without overlap.

    A domain has windows in proportion to its weight, so that the pooled tokens follow the mixture too; a domain of
    weight 0 has none. The held-out split judges, so there every domain has `n_seq`. Pieces are taken from the
    documents in turn, so that few windows already see many documents; a window may join the end of one piece to
    the start of the next. The seed decides the order, never the split. Raises UsageError when the text is too
    short, unless `allow_fewer` and at least one window is there, and for weights that give no mixture.
    """
    if n_seq < 1 or seq_len < 2 or not domains:
        raise ValueError(f"need domains, n_seq >= 1 and seq_len >= 2, got {len(domains)}, {n_seq}, {seq_len}")
    shares = mixture_shares(domains)
    built, weights = [], []
    for domain, share in zip(domains, shares, strict=True):
        if not share and split != "heldout":
            continue
        count = n_seq if split == "heldout" else max(1, round(n_seq * len(domains) * share))
        pool = Pool(domain.name, _turns(domain, split, seq_len * _CHARS_PER_TOKEN, seed))
        cut = cut_windows(tokenizer, draw([pool], random.Random(seed)), count, seq_len)
        require_windows(cut, domain.name, split, count, seq_len, allow_fewer)
        built.append((domain.name, cut.tokens))
        weights.append(share)
    return CalibrationSet(tuple(built), split, seed, tuple(weights))


def draw(pools: Sequence[Pool], rng: random.Random, chars: int = 1) -> Iterator[Piece]:
    """Pieces of pools drawn at random by weight, each pool from its own cursor; a pool that is read leaves the draw.

    A pool once drawn gives pieces until they have `chars` characters, so that pools of short pieces get their share.
    """
    rest = [(pool, iter(pool.pieces)) for pool in pools if pool.weight > 0]
    while rest:
        (entry,) = rng.choices(rest, [pool.weight for pool, _ in rest])
        taken = 0
        while taken < chars:
            piece = next(entry[1], None)
            if piece is None:
                rest.remove(entry)
                break
            yield piece
            taken += len(piece.text)


def cut_windows(tokenizer: Tokenizer, pieces: Iterable[Piece], count: int, seq_len: int) -> Windows:
    """At most `count` windows from the tokens of `pieces`, joined by blank lines; reads no more than it needs."""
    stream: list[int] = []
    ends: list[tuple[int, Piece]] = []  # where in the stream a piece stops
    for piece in pieces:
        stream += tokenizer.encode(piece.text.strip("\n") + "\n\n")
        ends.append((len(stream), piece))
        if len(stream) >= count * seq_len:
            break
    found = min(count, len(stream) // seq_len)
    tokens = torch.tensor(stream[: found * seq_len], dtype=torch.int64).reshape(found, seq_len)
    records = tuple(_records(ends, found, seq_len))
    return Windows(tokens, records, tuple(piece for _, piece in ends), len(stream))


def require_windows(cut: Windows, name: str, split: str, count: int, seq_len: int, allow_fewer: bool) -> None:
    """Raise UsageError when there are fewer than `count` windows, or none even if fewer are allowed."""
    if len(cut.tokens) < count and not (allow_fewer and len(cut.tokens)):
        raise UsageError(
            f"Domain {name} has {cut.stream_tokens} tokens for {split}, but {count} windows of "
            f"{seq_len} need {count * seq_len}. Give a longer text, or ask for fewer or shorter windows."
        )


def _records(ends: Sequence[tuple[int, Piece]], count: int, seq_len: int) -> Iterator[SequenceRecord]:
    """The pieces that reach into each window."""
    starts = [0, *(end for end, _ in ends)]
    for i in range(count):
        first, last = i * seq_len, (i + 1) * seq_len
        spans = zip(starts, ends, strict=False)
        inside = [(min(end, last) - max(start, first), p) for start, (end, p) in spans if end > first and start < last]
        counts, pieces = zip(*inside, strict=True)
        yield SequenceRecord(tuple(p.pool for p in pieces), tuple(p.document for p in pieces), counts, seq_len)


def _turns(domain: Domain, split: Split, piece_chars: int, seed: int) -> tuple[Piece, ...]:
    """Pieces of about `piece_chars` of all documents in a split: one of each, then a second of each, ..."""
    documents = list(domain.split(split))
    rng = random.Random(f"{domain.name}:{split}:{seed}")
    rng.shuffle(documents)
    queues = []
    for document in documents:
        pieces = [Piece(domain.name, document_id(document), text) for text in cut_lines(document, piece_chars)]
        start = rng.randrange(len(pieces))  # not always the head of a file: licences and imports
        queues.append(pieces[start:] + pieces[:start])
    depth = max((len(queue) for queue in queues), default=0)
    return tuple(queue[i] for i in range(depth) for queue in queues if i < len(queue))
