"""Whether the result is as good as the model it came from: equality, quality, gates, latency."""
