"""Runners: each executes the tiers of a bundle on one backend behind the protocol of `base`."""
