"""What must be so before a silo trains, asked where it costs nothing yet: its data, the model's layout, its own script.

Each function raises the error that ends the silo, or of which its coordinator is told.
"""

from __future__ import annotations

from gptfl_dist.config.plan import Plan
from gptfl_dist.config.silo import SiloFile
from gptfl_dist.errors import DataError, ModelError, PolicyError
from gptfl_dist.federation.orders import Order
from gptfl_dist.weights import Layout


def require_data(silo: SiloFile) -> None:
    """Raises DataError where the silo's data is not there: said at once, not by the trainer in the first round."""
    if silo.data is not None and not silo.data.path.exists():
        raise DataError(
            f"the data {silo.data.path} of {silo.name} does not exist",
            hint="check data.path in the silo file: it is relative to that file",
        )


def require_layout(expected: Layout, built: Layout) -> None:
    """Raises ModelError where the model that was built here has another layout than the federation's."""
    difference = expected.difference(built)
    if difference:
        raise ModelError(
            f"the model built here is not the federation's: {difference}",
            hint="use the coordinator's model definition and release",
        )


def require_built_in(silo: SiloFile, plan: Plan) -> None:
    """Raises PolicyError where a strategy wants more of the training than a script of the silo's own does."""
    if silo.code is not None and silo.code.script is not None and plan.kept:
        raise PolicyError(
            f"the strategy keeps {' and '.join(plan.kept)} from round to round, and code.script does not",
            hint="leave code.script out, or ask the coordinator for a strategy that needs the update alone",
        )
    if silo.code is not None and silo.code.script is not None and plan.samples is not None:
        raise PolicyError(
            "the federation hands out synthetic samples to train on, and code.script loads its own data",
            hint="leave code.script out, or ask the coordinator for mixing.samples none",
        )
    if silo.code is not None and silo.code.script is not None and plan.class_means:
        raise PolicyError(
            "the coordinator asks for class means, and this silo's code.script trains by itself",
            hint="leave code.script out, or ask the coordinator for training.first_round train",
        )


def require_training(silo: SiloFile, order: Order) -> None:
    """Raises PolicyError where an order asks for class means, and a script of the silo's own makes none."""
    means = order.training is not None and order.training.trained == "means"
    if means and silo.code is not None and silo.code.script is not None:
        raise PolicyError("the coordinator asks for class means, and this silo's code.script trains by itself")
