"""The command line: ``jlorax serve | demo | generate | chat | train | adapters | export``.

Here alone argv and the environment are read.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jlorax.client import DEFAULT_URL, Client
from jlorax.defaults import Machine, default_cache_dir
from jlorax.errors import ConfigError, JLoraxError
from servers import card, mps, settings, train

# jax's own share is 0.75; the rest of the card is for the driver and what it keeps for code
_MEMORY_FRACTION = 0.92
_MEMORY_FRACTIONS = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")  # new, old name


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, 1 for a failure, 2 for a wrong flag or value."""
    arguments = _parser().parse_args(argv)
    arguments.is_program = argv is None
    _configure_logging(arguments)
    try:
        status: int = arguments.run(arguments)
    except ConfigError as error:
        print(f"jlorax: error: {error}", file=sys.stderr)
        return 2
    except JLoraxError as error:
        print(f"jlorax: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "jlorax", description="Many fine-tuned LLMs for the price of one.", allow_abbrev=False
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    serve = _command(commands, "serve", _serve, "serve one base model and many adapters over HTTP")
    settings.add_arguments(serve)
    serve.add_argument("--dry-run", action="store_true", help="print the memory plan and end")

    demo = _command(commands, "demo", _demo, "serve the embedded model with its demo adapters")
    settings.add_arguments(demo)
    demo.add_argument("--once", action="store_true", help="end after the answers")

    generate = _command(commands, "generate", _generate, "complete a prompt on a running server")
    generate.add_argument("prompt")
    _client_arguments(generate)

    chat = _command(commands, "chat", _chat, "talk to a running server")
    _client_arguments(chat)

    training = _command(commands, "train", _train, "make an adapter: train a LoRA on examples")
    train.add_arguments(training)
    _cache_argument(training)

    adapters = commands.add_parser("adapters", help="list and import adapters", allow_abbrev=False)
    _adapters_commands(adapters.add_subparsers(metavar="ACTION", required=True))

    export = _command(commands, "export", _export, "base model and adapter as one model's folder")
    export.add_argument("--base", metavar="DIR|GGUF|HUB_ID", help="(default: the embedded model)")
    export.add_argument("--adapter", required=True, metavar="DIR", help="a PEFT folder")
    export.add_argument("--out", required=True, metavar="DIR", help="a folder that is not there")
    _cache_argument(export)
    return parser


def _adapters_commands(actions: Any) -> None:
    ls = _command(actions, "ls", _adapters, "what a running server can serve")
    ls.add_argument("--url", default=DEFAULT_URL)

    importing = _command(actions, "import", _import, "a PEFT folder as a name's next version")
    importing.add_argument("folder", metavar="DIR")
    importing.add_argument("--name", required=True, help="versions appear as NAME/1, NAME/2, ...")
    importing.add_argument(
        "--adapter-root", required=True, metavar="DIR", help="as `jlorax serve` has it"
    )


def _cache_argument(command: argparse.ArgumentParser) -> None:
    command.add_argument("--cache-dir", metavar="DIR", help="prepared models [JLORAX_CACHE_DIR]")


def _command(commands: Any, name: str, run: Any, help_text: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=help_text, description=help_text.capitalize() + ".", allow_abbrev=False
    )
    command.set_defaults(run=run)
    command.add_argument("--verbose", action="store_true", help="log more")
    return command


def _client_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--url", default=DEFAULT_URL, help=f"the server (default {DEFAULT_URL})")
    command.add_argument("--adapter", metavar="NAME", help="the adapter (default: the base model)")
    command.add_argument("--max-new-tokens", type=int, default=256, metavar="N")
    command.add_argument("--temperature", type=float, default=0.0, metavar="T")


def _configure_logging(arguments: argparse.Namespace) -> None:
    logging.basicConfig(
        level=logging.DEBUG if arguments.verbose else logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
        stream=sys.stderr,
    )
    for noisy in ("absl", "jax", "asyncio", "aiohttp", "urllib3", "huggingface_hub", "httpx"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


# ---- the server


def _serve(arguments: argparse.Namespace) -> int:
    from servers import serve

    values = settings.read_settings(vars(arguments), os.environ)
    server = settings.server_config(values)
    train_share = card.share(values.get("train_memory_bytes"), os.environ)
    if train_share is not None and not arguments.dry_run:
        mps.share_card(os.environ)
    on = machine(train_share or 0.0)
    engine = settings.engine_config(values, os.environ, on, server.num_tenants > 1)
    if arguments.dry_run:
        return serve.dry_run(engine)
    fine_tuning = settings.fine_tuning_config(values, engine, on, train_share)
    return asyncio.run(serve.serve(engine, server, fine_tuning))


def _demo(arguments: argparse.Namespace) -> int:
    from servers import demo

    values = settings.read_settings(vars(arguments), os.environ)
    server = settings.server_config(values)
    if server.api_keys is not None:
        raise ConfigError("the demo is for everybody on this machine: it takes no --api-keys")
    engine = settings.engine_config({**demo.DEFAULTS, **values}, os.environ, machine())
    return asyncio.run(demo.demo(demo.with_adapters(engine), server, arguments.once))


def machine(train_share: float = 0.0) -> Machine:
    """What the model will run on. Starts jax, which takes its share of a GPU's memory then;
    ``train_share`` of it is kept for trainings."""
    from jlorax.assembly import running_on

    _take_the_card(train_share)
    return running_on()


def _take_the_card(train_share: float = 0.0) -> None:
    """Unless somebody said how much of it; before jax starts."""
    if not any(name in os.environ for name in _MEMORY_FRACTIONS):
        os.environ[_MEMORY_FRACTIONS[0]] = f"{_MEMORY_FRACTION - train_share:.4f}"


# ---- training


def _train(arguments: argparse.Namespace) -> int:
    config, cache_dir = train.config_of(vars(arguments)), _cache_dir(arguments)
    as_json = arguments.json or not sys.stdout.isatty()
    _take_the_card()
    if arguments.dry_run:
        return train.dry_run(config, cache_dir, as_json=arguments.json)
    if arguments.is_program:
        train.with_huge_pages()
    return train.train(config, cache_dir, as_json=as_json)


def _import(arguments: argparse.Namespace) -> int:
    root = Path(arguments.adapter_root).expanduser()
    return train.import_adapter(Path(arguments.folder).expanduser(), arguments.name, root)


def _export(arguments: argparse.Namespace) -> int:
    adapter, out = (Path(path).expanduser() for path in (arguments.adapter, arguments.out))
    return train.export(arguments.base, adapter, out, _cache_dir(arguments))


def _cache_dir(arguments: argparse.Namespace) -> Path:
    named = arguments.cache_dir or os.environ.get("JLORAX_CACHE_DIR")
    return Path(named).expanduser() if named else default_cache_dir(os.environ)


# ---- the client


def _generate(arguments: argparse.Namespace) -> int:
    with _client(arguments) as client:
        for event in client.stream(arguments.prompt, **_options(arguments)):
            print(event.token.text, end="", flush=True)
    print()
    return 0


def _chat(arguments: argparse.Namespace) -> int:
    messages: list[dict[str, str]] = []
    with _client(arguments) as client:
        while (text := _ask()) is not None:
            messages.append({"role": "user", "content": text})
            answer = ""
            for event in client.stream_chat(messages, **_options(arguments)):
                answer += event.token.text
                print(event.token.text, end="", flush=True)
            print()
            messages.append({"role": "assistant", "content": answer})
    return 0


def _client(arguments: argparse.Namespace) -> Client:
    """Its key is a variable: what stands in argv is seen by every user of the machine."""
    return Client(arguments.url, api_key=os.environ.get("JLORAX_API_KEY"))


def _ask() -> str | None:
    """A line that is not empty; None at the end of input."""
    try:
        while not (text := input("> ").strip()):
            pass
    except EOFError:
        return None
    return text


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "adapter_id": arguments.adapter,
        "max_new_tokens": arguments.max_new_tokens,
        "temperature": arguments.temperature,
    }


def _adapters(arguments: argparse.Namespace) -> int:
    from servers.tables import adapter_table, show

    with _client(arguments) as client:
        show(adapter_table(client.adapters()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
