"""From a source to a published folder; ``build.py`` and ``export.py`` tell the story."""
