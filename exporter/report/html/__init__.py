"""The page: one HTML file with everything in it, which asks for nothing else and reads without script."""
