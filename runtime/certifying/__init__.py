"""Proof that decoding ahead changes nothing: exact distributions, tests, replay."""
