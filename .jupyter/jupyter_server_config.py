"""How `make lab` starts JupyterLab. Your own settings in ~/.jupyter are read, too, and stay as they are."""

from pathlib import Path

c = get_config()  # noqa: F821
# So that pictures and links of the notebooks, which lie beside their folder, can be shown.
c.ServerApp.root_dir = str(Path(__file__).resolve().parents[1])
# Nothing is asked of other machines. labconfig/page_config.json keeps the page from asking the reader.
c.LabApp.news_url = None
c.LabApp.check_for_updates_class = "jupyterlab.NeverCheckForUpdate"
# Messages to a kernel are encrypted; without this, the kernel warns in the terminal.
c.KernelManager.transport_encryption = "auto"
