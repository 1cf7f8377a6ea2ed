"""CCDS, cluster-based calibration sampling of EvoP (arXiv 2502.14910, section 3): rare topics count as much as common.

Documents are cut into chunks of sentences, chunks are embedded and clustered by k-means, and windows are filled with
chunks of clusters that are drawn uniformly, not by size. It is the sampler of the domain mixture (windows.py) over
pools that were found instead of given. Three things differ from the published code:

* every cluster has a cursor of its own; there, one position is shared by all, so that chunks are passed over;
* a window that closes inside a chunk leaves the rest of it to the next window; there, the rest is dropped;
* chunks end with their document, so that the splits of a domain share nothing; a cluster once drawn gives chunks until
  they have the usual size of one, so that a topic of short documents is not rare again in tokens.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from eopc_compiler.calibration.cutting import cut_sentences, join_sentences
from eopc_compiler.calibration.domains import Domain, Split, document_id
from eopc_compiler.calibration.embed import Embedding, Vectors, require_sklearn, tfidf_embedding
from eopc_compiler.calibration.windows import (
    CalibrationSet,
    Piece,
    Pool,
    SequenceRecord,
    Tokenizer,
    cut_windows,
    draw,
    require_windows,
)
from eopc_runtime.errors import UsageError

CLUSTERS = 5
SENTENCES = 60  # per chunk
MIN_CHUNKS = 3  # per cluster
_CHARS_PER_TOKEN = 4
_CHUNKS_WANTED = 12  # per cluster, on average


@dataclass(frozen=True, slots=True)
class CcdsSettings:
    """What a draw was asked for."""

    clusters: int = CLUSTERS
    sentences: int = SENTENCES
    per_cluster: bool = False  # a domain for each cluster instead of windows that mix them

    def __post_init__(self) -> None:
        if self.clusters < 1 or self.sentences < 1:
            raise ValueError(f"need clusters >= 1 and sentences >= 1, got {self.clusters}, {self.sentences}")


@dataclass(frozen=True, slots=True)
class Chunks:
    """Chunks of all documents; the last of a document may be shorter than `usual_chars`."""

    texts: tuple[tuple[str, str], ...]  # (document's SHA-256, text)
    sentences: int  # per chunk
    usual_chars: int


@dataclass(frozen=True, slots=True)
class CcdsRecord:
    """How a draw came about. `sequences` follow the windows; their pools are cluster names."""

    embedding: str
    sentences: int  # per chunk, after lowering for short texts
    cluster_chunks: tuple[tuple[str, int], ...]  # (cluster, chunks in it)
    sequences: tuple[SequenceRecord, ...]
    notes: tuple[str, ...]  # what is not as asked, one sentence each


@dataclass(frozen=True, slots=True)
class CcdsDraw:
    """A calibration set and its record."""

    calibration: CalibrationSet
    record: CcdsRecord


def ccds_calibration(
    tokenizer: Tokenizer,
    domains: Sequence[Domain],
    n_seq: int,
    seq_len: int,
    seed: int = 0,
    split: Split = "calibration",
    *,
    embedding: Embedding | None = None,
    settings: CcdsSettings | None = None,
    allow_fewer: bool = False,
) -> CcdsDraw:
    """Draw `n_seq` windows of `seq_len` tokens in all from the documents of one split, uniformly over clusters.

    The set has one domain "ccds" whose windows mix clusters, or, with `per_cluster`, one domain per cluster with its
    share of the windows. Domain names and weights play no part. Without an embedding, clusters are found by TF-IDF.
    No text is used twice: a cluster that has been read leaves the draw, and the record says so.

    Raises:
        UsageError: the text is too short for three chunks, or for the windows unless `allow_fewer`.
        MissingExtraError: scikit-learn is not installed.
    """
    require_sklearn()
    settings, embedding = settings or CcdsSettings(), embedding or tfidf_embedding(seed)
    documents = dict.fromkeys(document for domain in domains for document in domain.split(split))
    chunks = cut_chunks(list(documents), settings, seq_len)
    labels, notes = cluster(embedding([text for _, text in chunks.texts]), settings.clusters, seed)
    pools = _pools(chunks.texts, labels, seed)
    sets, sequences, read = [], list[SequenceRecord](), list[Piece]()
    for name, members, count in _targets(pools, n_seq, settings.per_cluster):
        pieces = draw(members, random.Random(f"draw:{seed}"), chunks.usual_chars)
        cut = cut_windows(tokenizer, pieces, count, seq_len)
        require_windows(cut, name, split, count, seq_len, allow_fewer)
        sets.append((name, cut.tokens))
        sequences += cut.records
        read += cut.pieces
    if chunks.sentences < settings.sentences:
        notes.append(f"Chunks have {chunks.sentences} sentences instead of {settings.sentences}.")
    if not settings.per_cluster:
        notes += _read_up(pools, read)
    sizes = tuple((pool.name, len(pool.pieces)) for pool in pools)
    record = CcdsRecord(embedding.label, chunks.sentences, sizes, tuple(sequences), tuple(notes))
    return CcdsDraw(CalibrationSet(tuple(sets), split, seed), record)


def cut_chunks(documents: Sequence[str], settings: CcdsSettings, seq_len: int) -> Chunks:
    """Cut documents into chunks of consecutive sentences.

    The sentences per chunk are lowered where chunks would be longer than a window (published: 60 sentences, somewhat
    less than 2048 tokens), or so few that clusters had under a dozen on average. Raises UsageError below three chunks.
    """
    cut = [(document_id(document), cut_sentences(document)) for document in documents]
    total = sum(len(sentences) for _, sentences in cut)
    chars = sum(map(len, documents))
    fitting = seq_len * _CHARS_PER_TOKEN * total // max(chars, 1)
    enough = total // (_CHUNKS_WANTED * settings.clusters)
    count = max(1, min(settings.sentences, fitting, enough))
    chunks = [(key, text) for key, sentences in cut for text in join_sentences(sentences, count) if text.strip()]
    if len(chunks) < MIN_CHUNKS:
        raise UsageError(
            f"The text has {len(chunks)} chunks of sentences; clustered calibration needs at least {MIN_CHUNKS}. "
            "Give a longer text."
        )
    return Chunks(tuple(chunks), count, count * chars // max(total, 1))


def cluster(vectors: Vectors, k: int, seed: int) -> tuple[list[int], list[str]]:
    """k-means labels per row, and notes; k is lowered until every cluster has at least three chunks."""
    from sklearn.cluster import KMeans

    distinct = len(np.unique(vectors, axis=0))
    for clusters in range(min(k, distinct, len(vectors) // MIN_CHUNKS), 1, -1):
        labels = [int(label) for label in KMeans(clusters, n_init=10, random_state=seed).fit_predict(vectors)]
        sizes = Counter(labels)
        if len(sizes) == clusters and min(sizes.values()) >= MIN_CHUNKS:
            break
    else:
        clusters, labels = 1, [0] * len(vectors)
    short = f"Clusters are {clusters} instead of {k}: with more, one would have under {MIN_CHUNKS} chunks."
    return labels, [short] if clusters < k else []


def _pools(chunks: Sequence[tuple[str, str]], labels: Sequence[int], seed: int) -> list[Pool]:
    """One pool per cluster, its chunks shuffled; the largest cluster is cluster0."""
    rng, pools = random.Random(f"ccds:{seed}"), []
    for rank, (label, _) in enumerate(Counter(labels).most_common()):
        members = [chunk for chunk, found in zip(chunks, labels, strict=True) if found == label]
        rng.shuffle(members)
        name = f"cluster{rank}"
        pools.append(Pool(name, tuple(Piece(name, key, text) for key, text in members)))
    return pools


def _targets(pools: Sequence[Pool], n_seq: int, per_cluster: bool) -> list[tuple[str, list[Pool], int]]:
    """(domain, pools it draws from, windows): one that mixes all clusters, or one for each."""
    if not per_cluster:
        return [("ccds", list(pools), n_seq)]
    return [(pool.name, [pool], max(1, n_seq // len(pools))) for pool in pools]


def _read_up(pools: Sequence[Pool], read: Sequence[Piece]) -> list[str]:
    """Notes on clusters that were read to their end, after which they had no share any more."""
    count = Counter(piece.pool for piece in read)
    return [
        f"All {len(pool.pieces)} chunks of {pool.name} were used; its share of the text may be less than uniform."
        for pool in pools
        if count[pool.name] == len(pool.pieces)
    ]
