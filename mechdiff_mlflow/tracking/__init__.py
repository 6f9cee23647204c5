"""Everything that touches MLflow: runs, the map flavour, winners and the shared view.

No other package of mechdiff_mlflow imports mlflow. Importing this package does not import mlflow either (its
modules do), so that `mechdiff --help` stays fast.
"""

import os

# MLflow decides about telemetry when it is imported, so this must come before any of our modules.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
