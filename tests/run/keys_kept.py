"""`gptfl` that tells the private keys which it makes: `python keys_kept.py FILE ARGUMENTS`. A line of hex each."""

from __future__ import annotations

import os
import sys

from cryptography.hazmat.primitives.asymmetric import ec

from gptfl_dist.cli.main import main

_make = ec.generate_private_key


def _made(curve: ec.EllipticCurve) -> ec.EllipticCurvePrivateKey:
    key = _make(curve)
    with os.fdopen(os.open(_file, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600), "w") as file:
        file.write(f"{key.private_numbers().private_value:064x}\n")
    return key


ec.generate_private_key = _made
_file = sys.argv.pop(1)
main()
