"""What clusters of calibration text are found by: one vector per chunk, from the model itself or from its words.

CCDS (EvoP, arXiv 2502.14910) embeds chunks with BERT. Here the model that is being compiled does it with the lower half
of its layers, or, where no model is loaded, TF-IDF with a truncated SVD. Any other embedding is a callable.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from eopc_compiler.calibration.windows import Tokenizer
from eopc_compiler.model import Llama
from eopc_compiler.sequences import run_layer
from eopc_runtime.errors import MissingExtraError

Vectors = NDArray[np.float64]
MODEL_TOKENS = 256  # of a chunk that the model reads
TFIDF_DIMS = 64


@dataclass(frozen=True, slots=True)
class Embedding:
    """A way to turn n texts into vectors [n, dims]; `label` is what a report calls it."""

    label: str
    embed: Callable[[Sequence[str]], Any]

    def __call__(self, texts: Sequence[str]) -> Vectors:
        """Vectors [n, dims] in fp64. Raises ValueError for another shape or values that are not finite."""
        vectors = np.asarray(self.embed(texts), dtype=np.float64)
        if vectors.ndim != 2 or len(vectors) != len(texts) or not np.isfinite(vectors).all():
            raise ValueError(f"{self.label} gave {vectors.shape} for {len(texts)} texts; expected finite [n, dims]")
        return vectors


def hidden_state_embedding(model: Llama, tokenizer: Tokenizer, max_tokens: int = MODEL_TOKENS) -> Embedding:
    """Mean of the hidden states behind the lower half of a checkpoint-form model's layers, over `max_tokens` tokens.

    Every position counts as a unit vector and the first is left out: a few positions, the first above all, have norms
    hundreds of times the others' whatever the text. Dimensions are then standardised over the chunks, because a few
    of them would make up most of every distance.
    """
    half = max(1, len(model.blocks) // 2)

    @torch.no_grad()
    def mean_state(text: str) -> Vectors:
        ids = tokenizer.encode(text)[:max_tokens]
        x = model.model.embed_tokens(torch.tensor([ids or [0]]))  # [1, S, hidden]
        for layer in model.blocks[:half]:
            x = run_layer(model, layer, x)
        x = x[0, 1:] if x.shape[1] > 1 else x[0]
        mean: Vectors = torch.nn.functional.normalize(x.double(), dim=-1).mean(0).numpy()
        return mean

    def embed(texts: Sequence[str]) -> Vectors:
        vectors = np.stack([mean_state(text) for text in texts])
        spread = vectors.std(0)
        standard: Vectors = (vectors - vectors.mean(0)) / np.where(spread > 0, spread, 1.0)
        return standard

    return Embedding(f"hidden states after layer {half} of {len(model.blocks)}, mean of {max_tokens} tokens", embed)


def tfidf_embedding(seed: int = 0, dims: int = TFIDF_DIMS) -> Embedding:
    """Latent semantic analysis: TF-IDF of words, truncated SVD to at most `dims`, unit length."""

    def embed(texts: Sequence[str]) -> Vectors:
        require_sklearn()
        from sklearn.decomposition import TruncatedSVD
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.preprocessing import normalize

        # Any run of word characters or one sign is a term, so that code and sums without words are not empty.
        terms = TfidfVectorizer(token_pattern=r"(?u)\w+|[^\w\s]", sublinear_tf=True).fit_transform(texts)
        rank = min(dims, min(terms.shape) - 1)
        if rank < 1:
            return np.ones((len(texts), 1))  # one text, or one term: nothing tells texts apart
        vectors: Vectors = normalize(TruncatedSVD(rank, random_state=seed).fit_transform(terms))
        return vectors

    return Embedding(f"TF-IDF, truncated SVD to {dims} dimensions", embed)


def require_sklearn() -> None:
    """Raise MissingExtraError where scikit-learn is not installed."""
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("Clustered calibration", "scikit-learn", "compiler") from error
