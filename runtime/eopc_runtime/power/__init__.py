"""Power meters: one small file each behind one protocol (`base.Meter`); nothing is opened at import."""
