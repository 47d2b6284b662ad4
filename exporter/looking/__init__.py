"""Looking at a model without running it: its layers, its tree of names, the types and the zeros of what it stores."""
