"""Limits of calibration that are needed without torch."""

KEPT_BYTES = 2**30
"""Most bytes of one linear's inputs that are kept between passes if they are wider than the hidden states, which are always kept."""
