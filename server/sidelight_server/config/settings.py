"""Settings: one class for flags, `SIDELIGHT_*` variables and `sidelight.toml`, in this order of precedence.

Field `max_chunk_rows` = flag `--max-chunk-rows` = variable `SIDELIGHT_MAX_CHUNK_ROWS` = key `max_chunk_rows`.
"""

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field
from pydantic_settings import CliSuppress

from ..errors import ConfigurationError
from ..telemetry.logs import LogFormat
from .model_settings import ModelSettings
from .traits import Listed

MEBIBYTE = 1024 * 1024


def _named_once(models: dict[str, ModelSettings]) -> dict[str, ModelSettings]:
    for name, table in models.items():
        if not name or table.name is not None:
            raise ValueError(f'table "{name}": the table\'s name is the model\'s name; remove the key "name"')
    return models


class Settings(ModelSettings):
    """All settings of the server. Validated at construction.

    Settings of models are defaults for all models; the tables in `models` override them.
    """

    models: Annotated[dict[str, ModelSettings], AfterValidator(_named_once), CliSuppress] = Field(
        {}, description="several models by name, each a table [models.NAME] of the file; unset: the one of `model`"
    )
    watch_s: float = Field(
        0.0, ge=0, description="seconds between checks of the models' files, to reload changed models; 0: no checks"
    )
    allow_reload: bool = Field(False, description="allow callers to reload a model from its source")

    listen: Annotated[tuple[str, ...], *Listed] = Field(
        ("127.0.0.1:50051",), min_length=1, description='addresses: "host:port" (port 0: a free one) or "unix:/path"'
    )
    plaintext: bool = Field(False, description="allow addresses that are not loopback without encryption")
    socket_mode: str | None = Field(
        None, pattern="^0?[0-7]{3}$", description='mode of UNIX sockets, as "660"; unset: by the umask'
    )
    tls_certificate: Path | None = Field(None, description="PEM file of the server's certificate chain; unset: no TLS")
    tls_key: Path | None = Field(None, description="PEM file of the certificate's key, without a password")
    tls_client_ca: Path | None = Field(
        None,
        description="PEM file of authorities for client certificates, which are then required; unset: not required",
    )
    tokens: Path | None = Field(
        None, description="file of bearer tokens, one per line; calls need one of them; unset: no token needed"
    )
    admin_tokens: Path | None = Field(
        None, description="file of tokens that may also reload models; unset: no token may, if tokens is set"
    )
    drain_s: float = Field(30.0, ge=0, description="seconds that running work may take after SIGTERM; 0: stop at once")

    stuck_s: float = Field(
        60.0, ge=0, description="seconds without progress after which a device counts as stuck in health; 0: never"
    )

    metrics_listen: str | None = Field(
        None, description="host:port of metrics over HTTP; empty: none; unset: 127.0.0.1:9464, if it is free"
    )
    log_format: LogFormat = Field("text", description="lines of the log as text, key=value, or as json")

    device: str = Field("auto", description="auto, cpu, cuda:N or mps; several with commas share the work")
    threads: int = Field(0, ge=0, description="CPU threads of one operation; 0: the CPUs that this process may use")
    dedicated_cpus: bool = Field(
        False, description="no other process uses these CPUs, so OpenMP threads keep spinning while they wait"
    )

    max_message_bytes: int = Field(
        64 * MEBIBYTE, ge=4096, le=2**31 - 1, description="limit of a message's bytes, in each direction"
    )
    max_in_flight: int = Field(256, ge=1, description="limit of batches in flight, over all callers")
    max_in_flight_bytes: int = Field(
        1024 * MEBIBYTE, ge=4096, description="limit of the bytes of batches in flight and their answers"
    )
    max_caller_rows: int = Field(
        1_000_000, ge=0, description="limit of the rows of one caller's batches in flight, if several; 0: no limit"
    )
    max_rendered_pixels: int = Field(
        1024 * 1024, ge=1, description="limit of height × width of a picture of a map that the server draws"
    )
    max_stream_in_flight: int = Field(
        32, ge=1, description="limit of unanswered batches of one stream, at which reading pauses"
    )
    max_peer_streams: int = Field(
        256, ge=0, description="limit of open streams of one host; callers over UNIX sockets count as one; 0: no limit"
    )
    max_stream_age_s: float = Field(
        3600.0,
        ge=0,
        description="seconds after which a stream ends with OK, once its batches are answered; 0: no limit",
    )
    stalled_write_s: float = Field(
        60.0, ge=0, description="seconds within which a client must accept an answer, or the call ends; 0: no limit"
    )
    max_arrival_s: float = Field(
        30.0, ge=0, description="seconds within which the message of a unary call must arrive; 0: no limit"
    )
    keepalive_s: float = Field(30.0, ge=0, description="seconds between pings that detect dead clients; 0: no pings")

    shared_memory: Path | None = Field(
        None, description="folder for shared memory regions, such as /dev/shm; unset: not allowed"
    )
    max_region_bytes: int = Field(1024 * MEBIBYTE, ge=1, description="limit of the bytes of one shared memory region")
    max_stream_regions: int = Field(
        8, ge=1, description="limit of the shared memory regions of one stream, or of one caller of Open Inference"
    )

    def of_models(self) -> dict[str, ModelSettings]:
        """Return the settings of every model by name, in order; without `models`, of the single model."""
        if not self.models:
            return {self.name or "": self.of_model("")}
        if self.model and all(table.model for table in self.models.values()):
            raise ConfigurationError(
                f'model: got "{self.model}", but the tables {", ".join(self.models)} set their own; leave it out'
            )
        return {name: self.of_model(name) for name in self.models}

    def of_model(self, name: str) -> ModelSettings:
        """Return the settings of one model: its table, with the general settings as defaults."""
        general = {name: getattr(self, name) for name in ModelSettings.model_fields}
        own = self.models[name].model_dump(exclude_unset=True) | {"name": name} if name in self.models else {}
        return ModelSettings(**general | own)
