"""The exchange over gRPC with mutual TLS 1.3. Silos dial out; the coordinator listens on one port."""

import os

# gRPC offers no setting for the oldest TLS version. Its list of TLS 1.2 suites is cut to one that needs an RSA
# certificate, and ours are ECDSA: so no TLS 1.2 handshake succeeds. It is read when grpc is first loaded.
os.environ["GRPC_SSL_CIPHER_SUITES"] = "ECDHE-RSA-AES128-GCM-SHA256"
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
