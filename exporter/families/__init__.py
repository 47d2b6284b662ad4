"""A file for each model family, found by the ``model_type`` of its config.json, and what families share."""
