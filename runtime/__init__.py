"""Run models: sessions over onnxruntime and engines."""
