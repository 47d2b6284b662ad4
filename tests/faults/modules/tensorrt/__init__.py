"""A stand-in for TensorRT that only remembers: engines are names, timings say on which GPU they were taken."""

from types import SimpleNamespace

__version__ = "10.9.0"
MAGIC, GPU = b"timings/1 ", b"this GPU"

ILogger, IProgressMonitor = type("ILogger", (), {}), type("IProgressMonitor", (), {})
NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=1)
BuilderFlag = SimpleNamespace(SPARSE_WEIGHTS=0)


class Timings:
    def __init__(self, content):
        self.content = content

    def serialize(self):
        return self.content


class Config:
    timings = None

    def add_optimization_profile(self, profile):
        return 0

    def set_flag(self, flag):
        pass

    def create_timing_cache(self, content):
        return Timings(content or MAGIC + GPU) if not content or content.startswith(MAGIC) else None

    def set_timing_cache(self, timings, ignore_mismatch):
        assert not ignore_mismatch
        if not timings.content.startswith(MAGIC + GPU):
            return False
        self.timings = timings
        return True

    def get_timing_cache(self):
        return self.timings


class Builder:
    def __init__(self, logger):
        pass

    def create_network(self, flags):
        return SimpleNamespace(num_layers=1)

    def create_builder_config(self):
        return Config()

    def create_optimization_profile(self):
        return SimpleNamespace(set_shape=lambda *_: None)

    def build_serialized_network(self, network, config):
        config.timings.content += b" measured"
        return b"engine"


class OnnxParser:
    num_errors = 0

    def __init__(self, network, logger):
        pass

    def parse_from_file(self, path):
        return True
