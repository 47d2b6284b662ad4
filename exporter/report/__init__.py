"""What a build tells about every node, tensor and try: as values, as tables, as a page."""
