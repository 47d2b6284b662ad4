"""From a source to a published artefact; ``build.py`` tells the story."""
