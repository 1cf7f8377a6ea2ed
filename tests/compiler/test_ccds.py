"""CCDS: clusters found in the text, drawn uniformly, and a record of every sequence."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from eopc_compiler.calibration import (
    CcdsSettings,
    Domain,
    Embedding,
    ccds_calibration,
    hidden_state_embedding,
    tfidf_embedding,
)
from eopc_compiler.calibration.ccds import cluster, cut_chunks
from eopc_compiler.calibration.cutting import cut_sentences, join_sentences
from eopc_compiler.calibration.domains import document_id
from eopc_compiler.model import build_model
from eopc_runtime.errors import MissingExtraError, UsageError

pytest.importorskip("sklearn", reason="scikit-learn of the compiler extra is not installed")

MakeTiny = Callable[..., tuple[Any, dict[str, torch.Tensor]]]
SEA = ("harbour", "sail", "anchor", "tide", "gull", "rope", "mast", "keel", "lantern", "storm", "net", "wave")
LAW = ("court", "judge", "appeal", "statute", "clause", "verdict", "jury", "witness", "oath", "ruling", "deed", "plea")


class ByteTokenizer:
    """One token per UTF-8 byte, below the vocabulary of the tiny model."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))


def story(words: Sequence[str], rng: random.Random, sentences: int = 20) -> str:
    """A document of one topic; each sentence starts with the topic's mark."""
    mark = "#" if words is SEA else "%"
    return "".join(f"{mark} {' '.join(rng.choices(words, k=7))}. " for _ in range(sentences))


def two_topics(common: int = 270, rare: int = 30) -> Domain:
    """Documents about the sea and, one in ten, about law."""
    rng = random.Random(7)
    return Domain("mixed", tuple([story(SEA, rng) for _ in range(common)] + [story(LAW, rng) for _ in range(rare)]))


def share_of_law(tokens: torch.Tensor) -> float:
    """Sentences about law over all sentences, by their marks."""
    text = bytes(tokens.flatten().tolist())
    return text.count(b"%") / (text.count(b"%") + text.count(b"#"))


def test_a_rare_topic_gets_its_uniform_share() -> None:
    """Of text that is 90:10, about half of the windows' sentences are from the rare topic; the record agrees."""
    drawn = ccds_calibration(ByteTokenizer(), [two_topics()], 60, 256, settings=CcdsSettings(clusters=2, sentences=5))
    assert drawn.calibration.names == ("ccds",)
    assert drawn.calibration.tokens.shape == (60, 256)
    assert 0.35 < share_of_law(drawn.calibration.tokens) < 0.65  # some 50 chunks: one standard deviation is 0.07
    documents = two_topics().split("calibration")  # of twenty sentences: four chunks each
    about_law = sum(document.startswith("%") for document in documents)
    assert dict(drawn.record.cluster_chunks) == {
        "cluster0": 4 * (len(documents) - about_law),
        "cluster1": 4 * about_law,
    }
    assert about_law / len(documents) < 0.13
    assert drawn.record.embedding.startswith("TF-IDF")


def test_without_clusters_the_rare_topic_keeps_its_tenth() -> None:
    """The same text drawn as one cluster: the uniform share above is the clusters' doing."""
    drawn = ccds_calibration(ByteTokenizer(), [two_topics()], 60, 256, settings=CcdsSettings(clusters=1, sentences=5))
    assert share_of_law(drawn.calibration.tokens) < 0.25
    assert not [note for note in drawn.record.notes if "Clusters" in note]


def test_the_record_says_where_each_window_comes_from() -> None:
    """Document ids are of the split's documents, and a window's text is in the documents its record names."""
    domain = two_topics()
    drawn = ccds_calibration(
        ByteTokenizer(), [domain], 20, 128, settings=CcdsSettings(clusters=2, sentences=5), split="selection"
    )
    texts = {document_id(document): document for document in domain.split("selection")}
    assert len(drawn.record.sequences) == 20
    for row, record in zip(drawn.calibration.tokens.tolist(), drawn.record.sequences, strict=True):
        assert record.tokens == 128
        assert set(record.pools) <= {"cluster0", "cluster1"}
        assert len(record.pools) == len(record.documents) == len(record.piece_tokens)
        assert sum(record.piece_tokens) == record.tokens
        for part in bytes(row).decode().split("\n\n"):
            assert any(part.strip() in texts[document] for document in record.documents)


def test_splits_draw_from_disjoint_documents() -> None:
    """No document's hash is in the records of two splits."""
    seen = [
        {
            document
            for record in ccds_calibration(
                ByteTokenizer(), [two_topics()], 20, 128, split=split, settings=CcdsSettings(2, 5)
            ).record.sequences
            for document in record.documents
        }
        for split in ("calibration", "selection", "heldout")
    ]
    assert all(seen)
    assert len(set().union(*seen)) == sum(map(len, seen))


def test_clusters_may_be_domains_of_their_own() -> None:
    """One pure domain per cluster, its share of the windows each."""
    drawn = ccds_calibration(
        ByteTokenizer(), [two_topics()], 20, 128, settings=CcdsSettings(clusters=2, sentences=5, per_cluster=True)
    )
    assert drawn.calibration.names == ("cluster0", "cluster1")
    assert [share_of_law(windows) for _, windows in drawn.calibration.domains] == [0.0, 1.0]
    assert [len(windows) for _, windows in drawn.calibration.domains] == [10, 10]
    assert drawn.calibration.weights == (0.5, 0.5)


def test_the_seed_decides_the_draw() -> None:
    """Equal seeds give equal windows, others do not."""
    sets = [ccds_calibration(ByteTokenizer(), [two_topics()], 5, 128, seed).calibration for seed in (1, 1, 2)]
    assert sets[0].fingerprint == sets[1].fingerprint != sets[2].fingerprint


def test_a_cluster_of_two_lowers_k_and_is_reported() -> None:
    """Four groups of which one has two members: three clusters, and a note; exact groups stay as they are."""
    vectors = np.repeat(np.eye(4) * 10, [8, 8, 8, 2], axis=0)
    labels, notes = cluster(vectors, 4, seed=0)
    assert len(set(labels)) == 3
    assert min(labels.count(label) for label in set(labels)) >= 3
    assert notes == ["Clusters are 3 instead of 4: with more, one would have under 3 chunks."]
    labels, notes = cluster(vectors[:24], 3, seed=0)
    assert (len(set(labels)), notes) == (3, [])


def test_text_that_is_all_the_same_has_one_cluster() -> None:
    """Nothing to tell chunks apart is no error."""
    labels, notes = cluster(np.ones((9, 3)), 2, seed=0)
    assert labels == [0] * 9
    assert "1 instead of 2" in notes[0]


def test_a_cluster_that_is_read_up_leaves_the_draw_and_is_reported() -> None:
    """The rare topic is used once and whole, never twice; the rest comes from the other."""
    rare = [d for d in two_topics(60, 15).split("calibration") if d.startswith("%")]
    drawn = ccds_calibration(
        ByteTokenizer(), [two_topics(60, 15)], 150, 256, settings=CcdsSettings(clusters=2, sentences=5)
    )
    assert any(note.startswith("All ") and "cluster1" in note for note in drawn.record.notes)
    assert bytes(drawn.calibration.tokens.flatten().tolist()).count(b"%") == 20 * len(rare)


def test_too_little_text_is_refused_with_its_numbers() -> None:
    """Both for chunks and for windows; fewer windows may be allowed."""
    with pytest.raises(UsageError, match=r"has 2 chunks.*at least 3"):
        ccds_calibration(ByteTokenizer(), [Domain("tiny", tuple("abcd"))], 1, 4)
    with pytest.raises(UsageError, match=r"ccds has \d+ tokens for calibration, but 500 windows"):
        ccds_calibration(ByteTokenizer(), [two_topics(20, 5)], 500, 512)
    fewer = ccds_calibration(ByteTokenizer(), [two_topics(20, 5)], 500, 512, allow_fewer=True)
    assert 1 <= len(fewer.calibration.tokens) < 500


def test_chunks_are_smaller_for_short_texts_and_short_windows() -> None:
    """Sixty sentences where there is room; else as many as leave a dozen per cluster, or fill a window."""
    sentences = "".join(f"Sentence number {i:04d} is here. " for i in range(6000))  # 30 characters each
    long, wide = CcdsSettings(), 2048
    assert cut_chunks([sentences], long, wide).sentences == 60
    assert cut_chunks([sentences], long, wide).usual_chars == 60 * 30
    assert cut_chunks([sentences[:30_000]], long, wide).sentences == 1000 // 60
    assert cut_chunks([sentences], long, 128).sentences == 128 * 4 // 30
    short = cut_chunks(["One. Two. Three."], long, wide)
    assert (len(short.texts), short.sentences) == (3, 1)


@pytest.mark.parametrize(
    "text",
    [
        "A b. C d! E f? g",
        "def f():\n    return 1.5\n\n\nx = 2\n",
        "no end " * 900,
        "\n\n. .\n",
        "Mr. X paid 3.50. Fine.",
    ],
)
def test_sentences_joined_are_the_text(text: str) -> None:
    """Nothing is lost, whatever the text, and no sentence is endless."""
    sentences = cut_sentences(text)
    assert "".join(sentences) == text
    assert "".join(join_sentences(sentences, 3)) == text
    assert max(map(len, sentences)) <= 1010


def test_sentences_end_where_the_published_code_ends_them() -> None:
    """At a full stop or exclamation mark before a blank or a line end; numbers stay whole."""
    assert cut_sentences("It is 3.5 m. Look! Yes.\nNo") == ["It is 3.5 m. ", "Look! ", "Yes.\n", "No"]


def test_the_model_itself_tells_topics_apart(make_tiny: MakeTiny) -> None:
    """A random model of bytes, at half depth, separates texts of letters from texts of digits, long or short."""
    config, tensors = make_tiny(max_position_embeddings=256)
    embedding = hidden_state_embedding(build_model(config, tensors), ByteTokenizer(), max_tokens=64)
    assert embedding.label == "hidden states after layer 1 of 3, mean of 64 tokens"
    rng = random.Random(3)
    texts = [
        "".join(rng.choices(kind, k=rng.randint(20, 90))) for kind in ("abcdefgh ", "12345678 ") for _ in range(10)
    ]
    labels, _ = cluster(embedding(texts), 2, seed=0)
    assert set(labels[:10]).isdisjoint(labels[10:])


def test_words_tell_topics_apart() -> None:
    """TF-IDF alone separates the two topics in short texts; one text, or texts without words, are no error."""
    rng = random.Random(3)
    texts = [story(SEA, rng, 3)[2:] for _ in range(10)] + [story(LAW, rng, 3)[2:] for _ in range(10)]
    labels, _ = cluster(tfidf_embedding()(texts), 2, seed=0)
    assert set(labels[:10]).isdisjoint(labels[10:])
    assert tfidf_embedding()(["only one"]).shape == (1, 1)
    assert len(tfidf_embedding()(["+ -", "- +", "* /"])) == 3


def test_the_mean_state_is_what_the_layers_give(make_tiny: MakeTiny) -> None:
    """Unit vectors of every position but the first, after one of three layers, from the whole model's own forward."""
    config, tensors = make_tiny(max_position_embeddings=256)
    model = build_model(config, tensors)
    texts = ["abcdefgh", "hgfedcba", "aabbccdd"]
    states: list[torch.Tensor] = []
    hook = model.blocks[0].register_forward_hook(lambda _m, _a, out: states.append(out[0][0].detach()))
    for text in texts:
        model.score(torch.tensor([ByteTokenizer().encode(text)]))
    hook.remove()
    means = torch.stack([(s[1:].double() / s[1:].double().norm(dim=-1, keepdim=True)).mean(0) for s in states]).numpy()
    expected = (means - means.mean(0)) / means.std(0)
    # fp32 layers through two attention routes, then divided by a spread over three similar texts
    np.testing.assert_allclose(hidden_state_embedding(model, ByteTokenizer())(texts), expected, atol=1e-3)


def test_a_given_embedding_is_used_and_named() -> None:
    """A callable that only sees the mark finds the topics; one of the wrong shape is refused."""
    marks = Embedding("marks", lambda texts: [[text.count("#"), text.count("%")] for text in texts])
    drawn = ccds_calibration(
        ByteTokenizer(), [two_topics()], 10, 128, embedding=marks, settings=CcdsSettings(2, 5, per_cluster=True)
    )
    assert drawn.record.embedding == "marks"
    assert [share_of_law(windows) for _, windows in drawn.calibration.domains] == [0.0, 1.0]
    with pytest.raises(ValueError, match=r"flat gave \(3,\) for 3 texts"):
        Embedding("flat", lambda texts: [1.0 for _ in texts])(["a", "b", "c"])


def test_without_scikit_learn_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The install line is shown before any work."""
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(MissingExtraError, match=r'pip install "eopc\[compiler\]"'):
        ccds_calibration(ByteTokenizer(), [two_topics()], 1, 64)


def test_settings_that_cannot_be_are_refused() -> None:
    """No clusters, no sentences."""
    with pytest.raises(ValueError, match="clusters >= 1"):
        CcdsSettings(clusters=0)
    with pytest.raises(ValueError, match="sentences >= 1"):
        CcdsSettings(sentences=0)
