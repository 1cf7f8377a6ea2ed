"""Calibration: measure a bundle's tiers on the device it runs on, fit the energy model, publish the prices."""
