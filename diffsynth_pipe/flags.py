"""Command-line flags made from ``RunConfig``: one flag per field, the same for every entry point."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, get_args

from diffsynth_pipe.config import RunConfig, Stage, comma_list, field_metadata, load_config, suggest
from diffsynth_pipe.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence


class FlagParser(argparse.ArgumentParser):
    """An argparse parser whose errors are ``ConfigError`` of one line."""

    def __init__(self, *, prog: str | None = None, description: str | None = None) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raise ``ConfigError`` where argparse would print the usage and exit."""
        raise ConfigError(message)

    def parse_flags(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        """Parse the command line.

        Raises:
            ConfigError: A flag is unknown, or lacks its value.
        """
        args, unknown = self.parse_known_args(argv)
        if unknown:
            flag = next((item for item in unknown if item.startswith("--")), unknown[0]).partition("=")[0]
            near = suggest(flag, [f"--{name}" for name in RunConfig.model_fields])
            message = f"unknown argument {flag!r}{near}"
            raise ConfigError(message)
        return args


def add_config_flags(parser: argparse.ArgumentParser) -> None:
    """Add ``[RUN.yaml]``, ``--config`` and one flag per field of ``RunConfig``, grouped as the fields are.

    Values stay strings: ``load_config`` parses them, so that a flag and a YAML value are checked by one rule.
    """
    parser.usage = "%(prog)s [RUN.yaml] [--flag value ...]"
    run_file = parser.add_mutually_exclusive_group()
    # No type=: argparse would convert the SUPPRESS marker of a missing positional and keep it.
    run_file.add_argument("config", metavar="RUN.yaml", nargs="?", default=argparse.SUPPRESS, help="run file")
    run_file.add_argument("--config", metavar="RUN.yaml", default=argparse.SUPPRESS, help="the same, as a flag")
    groups: dict[str, argparse._ArgumentGroup] = {}
    for name, field in RunConfig.model_fields.items():
        metadata = field_metadata(name)
        if metadata["group"] not in groups:
            groups[metadata["group"]] = parser.add_argument_group(metadata["group"])
        argument: dict[str, Any] = {"metavar": "VALUE"}
        if field.annotation is bool:
            argument = {"metavar": "true|false", "nargs": "?", "const": "true"}
        text = f"{field.description} {_default_text(name)}".replace("%", "%%")
        groups[metadata["group"]].add_argument(f"--{name}", default=argparse.SUPPRESS, help=text, **argument)


def config_from_args(args: argparse.Namespace) -> RunConfig:
    """Build the config from what a parser with ``add_config_flags`` parsed.

    Raises:
        ConfigError: As ``load_config``.
    """
    given = vars(args)
    overrides = {name: given[name] for name in RunConfig.model_fields if name in given}
    return load_config(Path(given["config"]) if "config" in given else None, overrides)


def stages_from_flag(flag: str, value: str) -> tuple[Stage, ...]:
    """Parse ``--stages`` or ``--force``: names of stages, comma-separated, in any order.

    Raises:
        ConfigError: A name is not that of a stage.
    """
    known: tuple[Stage, ...] = get_args(Stage)
    if unknown := sorted(set(comma_list(value)) - set(known)):
        message = f"{flag}: {unknown[0]!r} is not a stage; accepted: {', '.join(known)}"
        raise ConfigError(message)
    return tuple(stage for stage in known if stage in comma_list(value))


def closed_pipe_exit() -> int:
    """Return the exit code of a program whose output nobody reads on, as before ``| head``; what is left is dropped."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter reports it at its end
    return 128 + signal.SIGPIPE


def _default_text(name: str) -> str:
    default = RunConfig.model_fields[name].get_default()
    if RunConfig.model_fields[name].is_required():
        shown = "required"
    elif default is None:
        shown = "default: not set"
    else:
        shown = f"default: {str(default).lower() if isinstance(default, bool) else default}"
    return f"[{shown}]"
