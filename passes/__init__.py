"""Graph passes: one file, one idea.

Start with ``base.py``, then ``pipeline.py``; ``target.py`` holds what backends accept.
"""
