"""The exchange over gRPC with mutual TLS 1.3. Silos dial out; the coordinator listens on one port."""

import os
import sys

from gptfl_dist.errors import LaunchError

# gRPC offers no setting for the oldest TLS version. Its list of TLS 1.2 suites is cut to one that needs an RSA
# certificate, and ours are ECDSA: so no TLS 1.2 handshake succeeds. It is read when grpc is first loaded.
_SUITES = "ECDHE-RSA-AES128-GCM-SHA256"
if "grpc" in sys.modules and os.environ.get("GRPC_SSL_CIPHER_SUITES") != _SUITES:
    raise LaunchError(
        "grpc was imported before gptfl_dist.exchange.grpc, so TLS 1.2 cannot be shut out any more",
        hint="import gptfl_dist.exchange.grpc first",
    )
os.environ["GRPC_SSL_CIPHER_SUITES"] = _SUITES
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
