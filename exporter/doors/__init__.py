"""Front doors for what other packages hold: torch modules, transformers folders, optimum's exporters, pickles."""
