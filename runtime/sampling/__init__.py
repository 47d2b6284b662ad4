"""From logits to tokens: settings, distributions, and randomness that is keyed by position."""
