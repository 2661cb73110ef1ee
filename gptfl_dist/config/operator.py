"""The operator file: where a coordinator is that somebody operates or observes from afar, and by which certificate.

`gptfl join` writes it. The commands of an operator take it in the place of the federation file. The commented default
of every setting is `defaults/operator.yaml`. Paths are relative to the file.
"""

from __future__ import annotations

from typing import Literal

from gptfl_dist.config.base import Name, Section
from gptfl_dist.config.silo import Coordinator


class OperatorFile(Section):
    """The whole operator file. The role and the name are those of the certificate, which decides."""

    role: Literal["operator", "observer"]
    name: Name
    coordinator: Coordinator
