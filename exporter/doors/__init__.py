"""The doors that a source of an export comes in by; ``choose.py`` has the table, ``origin.py`` what each hands over."""
