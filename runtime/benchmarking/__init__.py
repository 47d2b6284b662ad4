"""What decoding ahead is worth: every way against plain decoding of the same prompts, in one run."""
