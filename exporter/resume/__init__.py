"""What a build keeps, and an equal one that comes later takes from it instead of computing it again."""
