"""Which units a model can best do without, and how what reads them makes up for their loss."""
