"""Reads the settings of a process from flags, `SIDELIGHT_*` variables and `sidelight.toml`, in this precedence."""

import argparse
import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from pydantic import ValidationError
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from ..errors import ConfigurationError
from .faults import first_fault
from .settings import Settings

FILE = Path("sidelight.toml")
PREFIX = "SIDELIGHT_"
OF_CLIENTS = ("SIDELIGHT_ADDRESS", "SIDELIGHT_TOKEN")  # variables of the client


class _Process(Settings, BaseSettings):
    """The settings of a process."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        toml_file=FILE,
        cli_prog_name="sidelight-server",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_avoid_json=True,
        cli_hide_none_type=True,
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)


class _Parser(argparse.ArgumentParser):
    """A parser that suggests a similar flag for an unknown one."""

    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ").split()
        flags = [flag for action in self._actions for flag in action.option_strings if flag.startswith("--")]
        if message.startswith("unrecognized") and (close := difflib.get_close_matches(unknown[0], flags, n=1)):
            message += f" (did you mean {close[0]}?)"
        self.exit(2, f"{self.prog}: {message}; --help lists the flags\n")


def read_settings(arguments: Sequence[str]) -> Settings:
    """Return the settings of a process. Raises `ConfigurationError`; `--help` exits."""
    flags: CliSettingsSource[argparse.ArgumentParser] = CliSettingsSource(
        _Process,
        root_parser=_Parser(
            prog="sidelight-server",
            description="Serves attributions of a PyTorch image model over gRPC.",
            epilog=f"Every setting can also be a variable ({PREFIX}MAX_CHUNK_ROWS) or a key of {FILE} in the working "
            "folder (max_chunk_rows); a flag wins over a variable, a variable over the file. --listen may be repeated. "
            "sidelight-server --check ADDRESS checks the health of a running server (--check --help).",
            allow_abbrev=False,
        ),
        cli_parse_args=list(arguments),
    )
    try:
        read = _Process(_cli_settings_source=flags)
    except ValidationError as error:
        raise ConfigurationError(first_fault(error, known=Settings.model_fields, where=str(FILE))) from None
    except ValueError as error:  # TOML that does not parse, JSON in a variable
        raise ConfigurationError(f"{FILE} or a {PREFIX}* variable: {error}") from None
    return Settings(**read.model_dump(exclude_unset=True))  # unset fields of a table are not values


def misspelt_variables() -> list[str]:
    """Return warnings for unknown variables similar to a setting. Others may be valid: `SIDELIGHT_SERVICE_HOST`."""
    known = [PREFIX + name.upper() for name in Settings.model_fields]
    unknown = [name for name in os.environ if name.startswith(PREFIX) and name not in (*known, *OF_CLIENTS)]
    nearly = {name: difflib.get_close_matches(name, known, n=1, cutoff=0.9) for name in unknown}
    return [f"{name} is not a setting; did you mean {close[0]}?" for name, close in nearly.items() if close]
