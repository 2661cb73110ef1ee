"""Whatever a test module imports first, grpc is loaded with our list of TLS suites."""

import gptfl_dist.exchange.grpc  # noqa: F401  (imported for what that does)
