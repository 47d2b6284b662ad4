"""Text in, text out: requests, stops, streams."""
