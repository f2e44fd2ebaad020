"""python -m wsolkit.demo checkpoint=PATH: a page in the browser to try a trained model on.

Drop an image, choose a class and a threshold, and see score map, box and mask change. This machine serves the page, to
itself alone unless `host` says otherwise, and nothing is asked of any other.
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
    """See conf/demo.yaml."""

    source: str | None
    host: str
    hosts: list[str]
    port: int


def demo(cfg: DictConfig, _: Path) -> None:
    """Serve the page of `cfg.checkpoint` until Ctrl-C, or until the process is asked to end."""
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
    localizer(np.zeros((8, 8, 3), np.uint8))  # the first image takes longest, and nobody should wait for it
    with listen(cfg.host, cfg.port) as listening, TemporaryDirectory(prefix="wsolkit_demo_") as folder:
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": folder}  # read by Gradio's imports
        from wsolkit.serving.page import build_app

        app = build_app(localizer, threshold, cfg.select, [base / name for name in names], cfg.host, list(cfg.hosts))
        host = f"[{cfg.host}]" if ":" in cfg.host else cfg.host
        print(f"Open http://{host}:{listening.getsockname()[1]} in a browser; Ctrl-C ends it", flush=True)
        try:
            serve(app, listening)
        finally:
            app.state.uploads.close()


def listen(host: str, port: int) -> socket.socket:
    """Open a port; 0: any that is free.

    Raises:
        ConfigError: it is taken, or there is no such host or port.
    """
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        reason = str(getattr(error, "strerror", None) or error).split(" (while")[0]
        raise ConfigError(
            f"host={host}, port={port}: the page cannot be served there ({reason}); port=0 takes any port that is free"
        ) from error


def serve(app: FastAPI, listening: socket.socket) -> None:
    """Answer requests until SIGINT or SIGTERM."""
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1))
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with suppress(KeyboardInterrupt):  # raised once the server has ended
        server.run(sockets=[listening])


def main() -> None:
    """Entry point of the command."""
    run_command_on_checkpoint("demo", demo)


if __name__ == "__main__":
    main()
