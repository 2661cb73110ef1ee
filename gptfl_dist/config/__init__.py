"""The federation, silo, operator and experiment files: their types, how they are loaded, and their JSON schemas.

Light on purpose (pydantic and PyYAML): the command line imports it before anything that needs a model.
"""

from __future__ import annotations

from gptfl_dist.config.base import Name, Section
from gptfl_dist.config.experiment import ExperimentFile
from gptfl_dist.config.federation import Arm, Federation, FederationFile, SiloEntry
from gptfl_dist.config.load import load_experiment, load_federation, load_operator, load_silo, to_yaml
from gptfl_dist.config.operator import OperatorFile
from gptfl_dist.config.plan import LocalTraining, Plan
from gptfl_dist.config.schema import experiment_schema, federation_schema, operator_schema, silo_schema
from gptfl_dist.config.silo import Code, Coordinator, Data, Policy, SiloFile
from gptfl_dist.config.synthesis import Filter, Generator, Prompts, Synthesis
from gptfl_dist.config.task import Model, Task
from gptfl_dist.config.training import Pretraining, Training, Tuning
from gptfl_dist.config.wire import Compression, Exchange, Limits

__all__ = [
    "Arm",
    "Code",
    "Compression",
    "Coordinator",
    "Data",
    "Exchange",
    "ExperimentFile",
    "Federation",
    "FederationFile",
    "Filter",
    "Generator",
    "Limits",
    "LocalTraining",
    "Model",
    "Name",
    "OperatorFile",
    "Plan",
    "Policy",
    "Pretraining",
    "Prompts",
    "Section",
    "SiloEntry",
    "SiloFile",
    "Synthesis",
    "Task",
    "Training",
    "Tuning",
    "experiment_schema",
    "federation_schema",
    "load_experiment",
    "load_federation",
    "load_operator",
    "load_silo",
    "operator_schema",
    "silo_schema",
    "to_yaml",
]
