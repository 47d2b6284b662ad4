"""One file per model family, found by the ``model_type`` of its config.json."""
