"""python -m wsolkit.demo checkpoint=PATH: try a trained model on a page in the browser.

Drop an image, choose a class and a threshold, and see how the score map, the box and the mask change. This machine
serves the page to itself alone, unless `host` says otherwise. It sends no request to any other machine.
"""

from __future__ import annotations

import os
import signal
import socket
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from wsolkit.errors import ConfigError
from wsolkit.predict import PredictionSettings, find_images
from wsolkit.settings.checks import check_config
from wsolkit.settings.command import run_command_on_checkpoint
from wsolkit.settings.conf import given_overrides

if TYPE_CHECKING:
    from fastapi import FastAPI
    from omegaconf import DictConfig


@dataclass
class Settings(PredictionSettings):
    """The settings of conf/demo.yaml."""

    source: str | None
    host: str
    hosts: list[str]
    port: int


def demo(cfg: DictConfig, _: Path) -> None:
    """Serve the page of `cfg.checkpoint` until Ctrl-C or a signal ends the process."""
    import numpy as np
    from omegaconf import OmegaConf

    if find_spec("gradio") is None:
        raise ConfigError("the page needs another package: pip install 'wsolkit[demo]'")
    if OmegaConf.is_missing(cfg, "checkpoint"):
        raise ConfigError("required and not given: checkpoint. Add checkpoint=…")

    from wsolkit.checkpoint import read_checkpoint
    from wsolkit.localizer import Localizer, used_threshold
    from wsolkit.settings.restore import restore
    from wsolkit.system.libraries import quieten_libraries

    checkpoint = read_checkpoint(cfg.checkpoint)
    cfg = restore(cfg, checkpoint, given_overrides(), protocols=True)
    check_config(cfg, Settings)
    quieten_libraries()
    base, names = (Path(), []) if cfg.source is None else find_images(cfg.source, Path(os.devnull))
    localizer = Localizer(cfg, checkpoint, cfg.device, cfg.precision, cfg.exif)
    threshold = used_threshold(localizer, cfg.threshold, given=False)
    # The first image takes longest, so the command runs one before a user waits for it.
    localizer(np.zeros((8, 8, 3), np.uint8))
    with listen(cfg.host, cfg.port) as listening, TemporaryDirectory(prefix="wsolkit_demo_") as folder:
        # Gradio reads these when it is imported.
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": folder}
        from wsolkit.serving.page import build_app

        app = build_app(localizer, threshold, cfg.select, [base / name for name in names], cfg.host, list(cfg.hosts))
        host = f"[{cfg.host}]" if ":" in cfg.host else cfg.host
        print(f"Open http://{host}:{listening.getsockname()[1]} in a browser; Ctrl-C ends it", flush=True)
        try:
            serve(app, listening)
        finally:
            app.state.uploads.close()


def listen(host: str, port: int) -> socket.socket:
    """Open a port. Port 0 stands for any free port.

    Raises:
        ConfigError: the port is taken, or the host or the port does not exist.
    """
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        reason = str(getattr(error, "strerror", None) or error).split(" (while")[0]
        raise ConfigError(
            f"host={host}, port={port}: the page cannot be served there ({reason}). port=0 takes any free port"
        ) from error


def serve(app: FastAPI, listening: socket.socket) -> None:
    """Answer requests until SIGINT or SIGTERM."""
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1))
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with suppress(KeyboardInterrupt):  # It is raised once the server has ended.
        server.run(sockets=[listening])


def main() -> None:
    """Run the command."""
    run_command_on_checkpoint("demo", demo)


if __name__ == "__main__":
    main()
