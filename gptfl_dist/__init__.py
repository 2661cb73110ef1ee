"""GPT-FL deployed for real: federated learning that starts from a model pre-trained on synthetic data."""

__version__ = "0.1.0"

from gptfl_dist.run.join import Silo, join

__all__ = ["Silo", "__version__", "join"]
