"""EvoP (arXiv 2502.14910): which layers to leave out, found by evolutionary search on calibration text."""
