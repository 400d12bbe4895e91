"""Runs, checkpoints and registered models in MLflow."""

import os

# MLflow would report its use over the network, and where that fails a thread of it changes the
# environment while the client reads it, which now and then ends in a KeyError.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
