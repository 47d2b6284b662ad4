"""How decoder graphs of exporters are read and written anew with a cache that is written in place."""
