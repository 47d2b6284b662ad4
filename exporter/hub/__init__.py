"""Models of a hub: the only code that opens connections, which files are taken, and each of them by its digest."""
