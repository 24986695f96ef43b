"""How `make lab`, Codespaces and Binder start JupyterLab. Your own settings in ~/.jupyter are read, too."""

import os
import re
import sys
from pathlib import Path

from jupyter_server import CallContext

from helpers import tracking

c = get_config()  # noqa: F821
# The project is the root, so that pictures and links outside the notebooks' folder can be shown.
c.ServerApp.root_dir = str(Path(__file__).resolve().parents[1])
# Nothing is asked of other machines. labconfig/page_config.json keeps the page from asking the reader.
c.LabApp.news_url = None
c.LabApp.check_for_updates_class = "jupyterlab.NeverCheckForUpdate"
# Messages to a kernel are encrypted; without this, the kernel warns in the terminal.
c.KernelManager.transport_encryption = "auto"

# A Codespace's own pages come from an address that Jupyter does not see; no other address is let in.
if name := os.environ.get("CODESPACE_NAME"):
    domain = os.environ.get("GITHUB_CODESPACES_PORT_FORWARDING_DOMAIN", "app.github.dev")
    c.ServerApp.allow_origin_pat = rf"https://{re.escape(name)}-\d+\.{re.escape(domain)}$"


def mlflow_headers(port: int) -> dict[str, str]:
    """The headers with which a request goes on to MLflow, which answers to its own address only.

    MLflow refuses changes that another site's page asks for. Behind the proxy every page looks like one, so
    Jupyter compares `Origin` and `Host` first; what it does not accept keeps its origin, and MLflow refuses.
    """
    address = f"127.0.0.1:{port}"
    if CallContext.get(CallContext.JUPYTER_HANDLER).check_origin():
        return {"Host": address, "Origin": f"http://{address}"}
    return {"Host": address}


# A tile in the launcher opens MLflow's pages at <this server>/mlflow/, where a port of its own may be out of
# reach. A store that is a server has pages of its own.
MLFLOW_UI = [sys.executable, "-m", "mlflow", "ui", "--workers", "1"]
store = tracking.default_uri()
if not store.startswith(("http:", "https:")):
    c.ServerProxy.servers = {
        "mlflow": {
            "command": [*MLFLOW_UI, "--host", "127.0.0.1", "--port", "{port}"],
            "environment": {
                "MLFLOW_BACKEND_STORE_URI": store.replace("{", "{{").replace("}", "}}"),
                # One reader needs neither four workers nor seven processes for background jobs.
                "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            },
            "timeout": 120,
            "request_headers_override": mlflow_headers,
            "launcher_entry": {"title": "MLflow", "category": "Other"},
        }
    }
