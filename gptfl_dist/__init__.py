"""GPT-FL deployed for real: federated learning that starts from a model pre-trained on synthetic data."""

__version__ = "0.1.0"

__all__ = ["__version__"]
