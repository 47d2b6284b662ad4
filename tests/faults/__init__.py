"""The catalogue of bad inputs and faults: every row a case, every case under the same eight invariants."""
