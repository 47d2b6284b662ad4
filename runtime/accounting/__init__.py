"""Where time and bytes go: records of rounds, the curve t(S), peaks of the machine, and what follows from them."""
