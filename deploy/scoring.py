"""MLflow's scoring server for the model in this image, without MLflow's launcher.

The launcher (mlflow 3.17) starts nginx and a shell between the container and the server: a SIGTERM would cut
answers off, and a server that was killed would end with exit code 0.
"""

import mlflow
from mlflow.pyfunc import scoring_server

app = scoring_server.init(mlflow.pyfunc.load_model("/opt/model"))
