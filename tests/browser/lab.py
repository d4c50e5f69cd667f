"""JupyterLab for one test module: own folders, a token, 127.0.0.1 only, and gone when the test process is gone."""

import json
import os
import secrets
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

FOLDERS = ("JUPYTERLAB_SETTINGS_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
SETTINGS = {
    "notebook-extension/tracker": {"windowingMode": "none"},  # every cell is on the page, also those out of sight
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "extensionmanager-extension/plugin": {"enabled": False},
}
START_SECONDS = 90

# Runs the server and ends it when its own input is closed: by stop(), by Ctrl-C, or because the tests were killed.
GUARD = """
import os, signal, subprocess, sys
server = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, start_new_session=True)
sys.stdin.buffer.read()
os.killpg(server.pid, signal.SIGTERM)
try:
    server.wait(15)
except subprocess.TimeoutExpired:
    os.killpg(server.pid, signal.SIGKILL)
"""


class Lab:
    """A JupyterLab server over the notebooks in `root`; `scratch` holds its settings, runtime files and kernelspec."""

    def __init__(self, root: Path, scratch: Path) -> None:
        self.root = root
        self.token = secrets.token_hex(16)
        self.port = _free_port()
        self.log = scratch / "server.log"
        environment = dict(os.environ)
        for name in FOLDERS:
            (scratch / name).mkdir()
            environment[name] = str(scratch / name)
        _write_settings(scratch / "JUPYTERLAB_SETTINGS_DIR")
        _write_kernelspec(scratch / "JUPYTER_DATA_DIR")
        command = [
            sys.executable,
            *("-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={self.port}"),
            "--ServerApp.port_retries=0",
            "--ServerApp.ip=127.0.0.1",
            f"--ServerApp.root_dir={root}",
            f"--IdentityProvider.token={self.token}",
            "--LabApp.expose_app_in_browser=True",
            "--LabApp.news_url=",
        ]
        with self.log.open("w") as log:
            self._guard = subprocess.Popen(
                [sys.executable, "-c", GUARD, *command],
                **{"env": environment, "cwd": root, "start_new_session": True},
                **{"stdin": subprocess.PIPE, "stdout": log, "stderr": subprocess.STDOUT},
            )
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise

    def url(self, notebook: str, workspace: str) -> str:
        return f"http://127.0.0.1:{self.port}/lab/workspaces/{workspace}/tree/{notebook}?token={self.token}&reset"

    def ask(self, method: str, path: str) -> Any:
        """One call of the server's REST interface."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/api/{path}",
            method=method,
            headers={"Authorization": f"token {self.token}"},
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            body = answer.read()
        return json.loads(body) if body else None

    def end_kernels(self) -> None:
        for session in self.ask("GET", "sessions"):
            self.ask("DELETE", f"sessions/{session['id']}")

    def stop(self) -> None:
        assert self._guard.stdin is not None
        self._guard.stdin.close()
        self._guard.wait(30)

    def _wait(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            try:
                self.ask("GET", "status")
                return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.2)
        raise RuntimeError(f"JupyterLab did not answer within {START_SECONDS} s:\n{self.log.read_text()[-2000:]}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _write_settings(folder: Path) -> None:
    for name, values in SETTINGS.items():
        extension, plugin = name.split("/")
        place = folder / "@jupyterlab" / extension
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{plugin}.jupyterlab-settings").write_text(json.dumps(values))


def _write_kernelspec(data: Path) -> None:
    """The kernel that the reader's copies name, on this interpreter: nothing is installed for all."""
    place = data / "kernels" / "stepengine"
    place.mkdir(parents=True)
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": argv, "display_name": "stepengine", "language": "python"}
    (place / "kernel.json").write_text(json.dumps(spec))
