"""``jlorax serve``: an engine and the HTTP server over it, in one process."""

from __future__ import annotations

import gc
import logging
import socket

from jlorax.assembly import bank_layout, build_registry, find_model, plan_memory
from jlorax.config import EngineConfig, FineTuningConfig, ServerConfig
from jlorax.engine import Engine
from jlorax.errors import ConfigError
from jlorax.jobs.service import Served, TrainingJobs
from jlorax.models.config import read_config
from servers.progress import StartProgress
from servers.rest import OBJECTS_PER_COLLECTION, create_app, run_server
from servers.tables import memory_table, show

log = logging.getLogger("jlorax")


async def serve(config: EngineConfig, server: ServerConfig, fine_tuning: FineTuningConfig) -> int:
    """Serves until SIGTERM or Ctrl-C; 1 when the engine died meanwhile."""
    check_port(server)
    with StartProgress() as progress:
        engine = await Engine.start(config, progress)
    gc.set_threshold(OBJECTS_PER_COLLECTION)
    async with engine:
        log.info(
            "ready: %s on %s, %d slots",
            engine.model_info.model_id,
            engine.model_info.device,
            engine.model_info.max_slots,
        )
        info = engine.model_info
        served = Served(info.model_id, info.max_rank, info.max_seq_len)
        app = create_app(engine, server, jobs=TrainingJobs(fine_tuning, served))
        await run_server(app, server.host, server.port)
        return 1 if engine.stats().state == "dead" else 0


def dry_run(config: EngineConfig) -> int:
    """Prints what a start would take. Fetches and prepares the model when it is not here yet."""
    with StartProgress() as progress:
        folder, model_id = find_model(config, progress)
    model = read_config(folder)
    registry = build_registry(config, model_id)
    show(memory_table(plan_memory(config, model, registry, bank_layout(config, model))))
    return 0


def check_port(server: ServerConfig) -> None:
    """Says that a port is taken now, rather than after a minute of loading."""
    family = socket.AF_INET6 if ":" in server.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((server.host, server.port))
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {server.host} port {server.port}: {error.strerror or error}; "
                "choose another --port"
            ) from error
