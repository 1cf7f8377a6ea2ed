"""The energy model of a sequence: its forms, the fit to measurements, the margin, and the sweet spot."""
