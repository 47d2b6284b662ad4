"""Targets that a fuzzer drives, their corpus, and what runs them; ``make fuzz`` starts it."""
