"""Settings: one class for flags, `SIDELIGHT_*` variables and `sidelight.toml`, in this order of precedence.

Field `max_chunk_rows` = flag `--max-chunk-rows` = variable `SIDELIGHT_MAX_CHUNK_ROWS` = key `max_chunk_rows`.
"""

import argparse
import difflib
import json
import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    CliSuppress,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from ..errors import ConfigurationError
from ..inputs.preprocessing import RESIZES, Interpolation, is_resize
from ..telemetry.logs import LogFormat
from .options import Activation, Outputs, Precision
from .spec import ModelSpec

FILE = Path("sidelight.toml")
SOURCES = "python:package.module:factory, export:FILE.pt2, torchscript:FILE, hf:DIR or onnx:FILE"
PREFIX = "SIDELIGHT_"
OF_CLIENTS = ("SIDELIGHT_ADDRESS", "SIDELIGHT_TOKEN")  # the command line's
MEBIBYTE = 1024 * 1024


def _split(value: object) -> object:
    """Return the items of a list as a variable holds it: "3,224,224", or JSON. Flags and the file bring lists."""
    if not isinstance(value, str):
        return value
    is_json = value.startswith("[") and value.endswith("]")  # unlike "[::1]:50051"
    return json.loads(value) if is_json else [each.strip() for each in value.split(",")]


def _way_to_resize(value: int | str) -> int | str:
    if not is_resize(value):
        raise ValueError(f"expected {RESIZES}")
    return value


_Listed = (NoDecode, BeforeValidator(_split))


class ModelSettings(BaseModel):
    """What an operator can set of a model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field("", description=f"where the model comes from: {SOURCES}")
    weights: Path | None = Field(None, description="weights for it: .safetensors, or a weights-only .pt")
    name: str | None = Field(
        None, description="what requests call the model; if unset, the name of its file, folder or module"
    )
    load: Literal["eager", "lazy"] = Field("eager", description="load at start, or when the first request comes")
    input_size: Annotated[tuple[int, int, int] | None, *_Listed] = Field(
        None, description="C,H,W of the model's input; unset: floating arrays of any shape, neither files nor pixels"
    )
    trial_size: Annotated[tuple[int, int, int] | None, *_Listed] = Field(
        None, description="C,H,W that a model of any input size is tried with when it is loaded; unset: it is not tried"
    )
    mean: Annotated[tuple[float, ...] | None, *_Listed] = Field(
        None, description="one for each channel, of pixels in pixel_range; unset: 0"
    )
    std: Annotated[tuple[float, ...] | None, *_Listed] = Field(
        None, description="one for each channel, of pixels in pixel_range; unset: 1"
    )
    pixel_range: Annotated[tuple[float, float] | None, *_Listed] = Field(
        None, description="what pixels 0 and 255 are scaled to before the mean is subtracted; unset: 0,1"
    )
    resize: Annotated[int | str, Field(union_mode="left_to_right"), AfterValidator(_way_to_resize)] | None = Field(
        None,
        description='short side in pixels before the centre crop, or height and width, "256x256"; or "exact", those of '
        'the input; or "none"; unset: just covers the input',
    )
    interpolation: Interpolation | None = Field(None, description="the filter of resizing; unset: bilinear")
    window: Annotated[tuple[float, float] | None, *_Listed] = Field(
        None, description="values of 16-bit and DICOM files that become black and white; unset: as the file says"
    )
    input: str | None = Field(None, description="the model's keyword that takes the images; unset: found out")
    arguments: dict[str, bool | int | float | str] | None = Field(
        None, description="constants for other keywords of the model, as JSON or a table of the file"
    )
    label: str | None = Field(None, description="a keyword that demands labels, and gets zeros; unset: found out")
    output: str | int | None = Field(
        None, description="key, attribute or place of the outputs in what the model returns; unset: found out"
    )
    outputs: Outputs | None = Field(None, description="what they are, [N, K] or [N, K, h, w]; unset: found out")
    activation: Activation | None = Field(
        None, description="softmax where classes exclude each other, sigmoid where they do not; unset: found out"
    )
    layer_layout: dict[str, str] | None = Field(
        None,
        description='where positions lie in what layers return, "nchw", "nhwc" or "tokens:P:HxW" by layer, as JSON or '
        "a table of the file; for layers where that cannot be found out",
    )
    labels: Path | None = Field(None, description="a text file of class names, one a line, in the classes' order")

    max_chunk_rows: int = Field(
        0, ge=0, le=4096, description="rows that the device runs at once, at most; 0: measured at load, and later again"
    )
    max_chunk_s: float = Field(0.5, gt=0, description="seconds that a chunk may take, where its rows are measured")
    device_memory_limit: int = Field(
        0,
        ge=0,
        description="bytes that a chunk may take, where that is measured; 0: half of what is free",
    )
    precision: Precision | None = Field(
        None, description="type that the model computes in; unset: that of its weights; half precision: rougher maps"
    )
    fold: bool = Field(False, description="fold BatchNorm into convolutions: faster, other rounding")
    channels_last: bool = Field(False, description="lay pictures out by pixel: faster on most CPUs and GPUs")
    compile: bool = Field(False, description="compile the model with torch.compile; needs a C compiler, and minutes")
    cuda_graphs: bool = Field(False, description="on a GPU: replay recorded kernels for a ladder of chunk sizes")
    accept_partial_gradient: bool = Field(
        False,
        description="serve gradients that miss a part of what the outputs do, as a check at load says",
    )
    reproducible: bool = Field(False, description="the same bytes whatever the load, the place and the company")
    reproducible_rows: int = Field(
        1, ge=1, le=4096, description="rows of a reproducible chunk; more than 1 only where a check at load shows it"
    )
    max_image_pixels: int = Field(50_000_000, ge=1, description="height × width of an encoded picture")
    max_decode_s: float = Field(
        5.0, gt=0, description="seconds of CPU time that one encoded picture may take, decoded and resized"
    )
    max_example_rows: int = Field(10_000, ge=1, description="rows that a method may ask for one example")
    max_model_in_flight: int = Field(0, ge=0, description="batches at work at once for one model; 0: no more limit")

    def traits(self) -> dict[str, Any]:
        """Return what completes a model's specification. `ConfigurationError` where labels cannot be read."""
        names = {field.name for field in fields(ModelSpec)} & set(ModelSettings.model_fields) - {"labels"}
        # A switch that is off says nothing against a specification's own.
        said = {name: value for name in names if (value := getattr(self, name)) is not False}
        return said | {"labels": _read_labels(self.labels)}


def _named_once(models: dict[str, ModelSettings]) -> dict[str, ModelSettings]:
    for name, table in models.items():
        if not name or table.name is not None:
            raise ValueError(f'table "{name}": a model is called as its table is; "name" is no key of it')
    return models


class Settings(ModelSettings):
    """All that an operator can set. Checked once, when it is made.

    What is said of models here holds for each that does not say otherwise in `models`.
    """

    models: Annotated[dict[str, ModelSettings], AfterValidator(_named_once), CliSuppress] = Field(
        {}, description="several models by name, each a table [models.NAME] of the file; unset: the one of `model`"
    )
    watch_s: float = Field(
        0.0, ge=0, description="seconds between looks at the models' files, to load again those that changed; 0: none"
    )
    allow_reload: bool = Field(False, description="let callers have a model loaded again from its source")

    listen: Annotated[tuple[str, ...], *_Listed] = Field(
        ("127.0.0.1:50051",), min_length=1, description='addresses: "host:port" (port 0: a free one) or "unix:/path"'
    )
    plaintext: bool = Field(False, description="allow addresses that are not loopback, although nothing is encrypted")
    socket_mode: str | None = Field(
        None, pattern="^0?[0-7]{3}$", description='mode of UNIX sockets, as "660"; unset: what the umask leaves'
    )
    tls_certificate: Path | None = Field(
        None, description="PEM file of the certificates that ports show; unset: no TLS"
    )
    tls_key: Path | None = Field(None, description="PEM file of the certificate's key, without a password")
    tls_client_ca: Path | None = Field(
        None, description="PEM file of authorities, one of which must have signed a caller's certificate; unset: none"
    )
    tokens: Path | None = Field(None, description="file of bearer tokens, one a line, that calls need; unset: none")
    admin_tokens: Path | None = Field(
        None, description="file of tokens that may also have models loaded again; unset: nobody may if tokens are set"
    )
    drain_s: float = Field(30.0, ge=0, description="seconds that running work may take after SIGTERM; 0: none")

    stuck_s: float = Field(
        60.0, ge=0, description="seconds without progress after which a device counts as stuck in health; 0: never"
    )

    metrics_listen: str | None = Field(
        None, description="host:port of metrics over HTTP; empty: none; unset: 127.0.0.1:9464, if that is free"
    )
    log_format: LogFormat = Field("text", description="lines of the log as text, key=value, or as json")

    device: str = Field("auto", description="auto, cpu, cuda:N or mps; several with commas share the work")
    threads: int = Field(0, ge=0, description="CPU threads of one operation; 0: the CPUs that this process may use")
    dedicated_cpus: bool = Field(
        False, description="no other process needs these CPUs: OpenMP's threads keep spinning while they wait for work"
    )

    max_message_bytes: int = Field(64 * MEBIBYTE, ge=4096, le=2**31 - 1, description="bytes of a message, each way")
    max_in_flight: int = Field(256, ge=1, description="batches at work at once, over all callers")
    max_in_flight_bytes: int = Field(1024 * MEBIBYTE, ge=4096, description="bytes of those batches and their answers")
    max_caller_rows: int = Field(
        1_000_000,
        ge=0,
        description="rows that several batches of one caller at work may take together; 0: no limit",
    )
    max_stream_in_flight: int = Field(32, ge=1, description="unanswered batches of one stream; reading pauses there")
    max_peer_streams: int = Field(
        256, ge=0, description="streams of one host at once; callers over UNIX sockets count as one; 0: no limit"
    )
    max_stream_age_s: float = Field(
        3600.0, ge=0, description="seconds after which a stream is answered and ended with OK; 0: without end"
    )
    stalled_write_s: float = Field(
        60.0,
        ge=0,
        description="seconds from an answer until its caller has accepted all of it, or the call ends; 0: without end",
    )
    max_arrival_s: float = Field(
        30.0, ge=0, description="seconds in which the message of a unary call must have arrived; 0: without end"
    )
    keepalive_s: float = Field(30.0, ge=0, description="seconds between pings that find out dead callers; 0: no pings")

    shared_memory: Path | None = Field(
        None, description="the folder where streams may share memory, as /dev/shm; unset: none may"
    )
    max_region_bytes: int = Field(1024 * MEBIBYTE, ge=1, description="bytes of one region of shared memory")
    max_stream_regions: int = Field(8, ge=1, description="regions of shared memory of one stream")

    def of_models(self) -> dict[str, ModelSettings]:
        """Return the settings of every model by its name, in order; without tables of the one that stands here."""
        if not self.models:
            return {self.name or "": self.of_model("")}
        if self.model and all(table.model for table in self.models.values()):
            raise ConfigurationError(
                f'model: got "{self.model}", but the tables {", ".join(self.models)} all say their own; leave it out'
            )
        return {name: self.of_model(name) for name in self.models}

    def of_model(self, name: str) -> ModelSettings:
        """Return the settings of one model: what its table says, and for what that leaves out what stands here."""
        general = {name: getattr(self, name) for name in ModelSettings.model_fields}
        own = self.models[name].model_dump(exclude_unset=True) | {"name": name} if name in self.models else {}
        return ModelSettings(**general | own)


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
        """Return the sources, the first that speaks winning. The flags stand before them all."""
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)


class _Parser(argparse.ArgumentParser):
    """A parser that suggests the flag that was meant."""

    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ").split()
        flags = [flag for action in self._actions for flag in action.option_strings if flag.startswith("--")]
        if message.startswith("unrecognized") and (close := difflib.get_close_matches(unknown[0], flags, n=1)):
            message += f" (did you mean {close[0]}?)"
        self.exit(2, f"{self.prog}: {message}; --help lists the flags\n")


def read_settings(arguments: Sequence[str]) -> Settings:
    """Return the settings of a process. `ConfigurationError` names what is wrong, and where; `--help` exits."""
    flags: CliSettingsSource[argparse.ArgumentParser] = CliSettingsSource(
        _Process,
        root_parser=_Parser(
            prog="sidelight-server",
            description="Serves attributions of a PyTorch image model over gRPC.",
            epilog=f"Every setting can also be a variable ({PREFIX}MAX_CHUNK_ROWS) or a key of {FILE} in the working "
            "folder (max_chunk_rows); a flag wins over a variable, a variable over the file. --listen may be repeated. "
            "sidelight-server --check ADDRESS asks a running server for its health (--check --help).",
            allow_abbrev=False,
        ),
        cli_parse_args=list(arguments),
    )
    try:
        read = _Process(_cli_settings_source=flags)
    except ValidationError as error:
        raise ConfigurationError(first_fault(error, where=str(FILE))) from None
    except ValueError as error:  # TOML that does not parse, JSON in a variable
        raise ConfigurationError(f"{FILE} or a {PREFIX}* variable: {error}") from None
    return Settings(**read.model_dump(exclude_unset=True))  # a table says nothing of what it leaves out


def misspelt_variables() -> list[str]:
    """Return warnings about variables that are nearly a setting. (Others may well be: `SIDELIGHT_SERVICE_HOST`.)"""
    known = [PREFIX + name.upper() for name in Settings.model_fields]
    unknown = [name for name in os.environ if name.startswith(PREFIX) and name not in (*known, *OF_CLIENTS)]
    nearly = {name: difflib.get_close_matches(name, known, n=1, cutoff=0.9) for name in unknown}
    return [f"{name} is no setting; did you mean {close[0]}?" for name, close in nearly.items() if close]


def first_fault(error: ValidationError, *, where: str) -> str:
    """Say in a line what the first thing wrong is, and where."""
    wrong = error.errors()[0]
    path = [str(each) for each in wrong["loc"]]
    is_of_model = path[:1] == ["models"] and len(path) > 2  # models, its name, a setting
    name = ".".join(path[:3]) if is_of_model else path[0] if path else "settings"
    if wrong["type"] == "extra_forbidden":
        known = ModelSettings.model_fields if is_of_model else Settings.model_fields
        close = difflib.get_close_matches(name.rpartition(".")[2], known, n=1)
        return f"{name}: there is no such setting in {where}" + (f"; did you mean {close[0]}?" if close else "")
    why = "too few numbers" if wrong["type"] == "missing" and len(path) > 1 else wrong["msg"]
    return f"{name}: got {wrong['input']!r}: {why}"


def _read_labels(path: Path | None) -> tuple[str, ...] | None:
    if path is None:
        return None
    try:
        return tuple(path.read_text(encoding="utf-8").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"labels: {path}: {getattr(error, 'strerror', None) or error}") from None
