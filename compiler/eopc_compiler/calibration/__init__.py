"""Calibration text: documents in named domains, their splits, and token windows drawn from them.

domains.py      a domain: documents, relative weight, three splits that share no document
builtin.py      text, code, arithmetic and dialogue that every Python installation gives
arithmetic.py, dialogue.py      the generated ones
user_text.py    --calib NAME=FILE[:FIELD][@WEIGHT]
hub.py          --calib NAME=hf:DATASET
windows.py      the sampler, and token windows per domain
own.py          what the model writes itself
ccds.py         windows drawn uniformly over clusters that are found in the text
select.py       --calib-select: by domain, or by cluster
embed.py        what the clusters are found by
"""

from eopc_compiler.calibration.builtin import default_domains
from eopc_compiler.calibration.ccds import CcdsDraw, CcdsRecord, CcdsSettings, ccds_calibration
from eopc_compiler.calibration.domains import Domain, Split
from eopc_compiler.calibration.embed import Embedding, hidden_state_embedding, tfidf_embedding
from eopc_compiler.calibration.select import CalibSelect, select_calibration
from eopc_compiler.calibration.user_text import load_calib, load_texts, read_mixture
from eopc_compiler.calibration.windows import (
    Batch,
    CalibrationSet,
    Tokenizer,
    build_calibration,
    by_domain,
    domain_means,
)

__all__ = [
    "Batch",
    "CalibSelect",
    "CalibrationSet",
    "CcdsDraw",
    "CcdsRecord",
    "CcdsSettings",
    "Domain",
    "Embedding",
    "Split",
    "Tokenizer",
    "build_calibration",
    "by_domain",
    "ccds_calibration",
    "default_domains",
    "domain_means",
    "hidden_state_embedding",
    "load_calib",
    "load_texts",
    "read_mixture",
    "select_calibration",
    "tfidf_embedding",
]
