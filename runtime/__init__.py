"""Run models: sessions over onnxruntime, their profile, and the memory of a process that builds."""
