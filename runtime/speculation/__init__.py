"""Tokens proposed and verified: proposers, rules, rounds, and how far to look ahead."""
