"""eopc runtime: runs bundles of LLaMA-family tiers under a joule budget, without torch."""

__version__ = "0.1.0"
