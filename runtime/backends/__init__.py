"""One session for each runtime: onnxruntime, TensorRT, TensorRT for RTX."""
