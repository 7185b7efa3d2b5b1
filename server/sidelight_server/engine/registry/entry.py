"""A registry entry: one model by its name, with its serving version and the source of the next one."""

import enum
import threading
from concurrent.futures import Future
from pathlib import Path

from ...config.model_settings import ModelSettings
from ...config.spec import ModelSpec
from ...models import sources
from ...models.model import Model

Version = tuple[Model, ...]  # one version of a model: its replica on each device
# Path, inode, size and modification time in ns of each file; −1 for a missing file. The time alone would be the same
# after two writes within one tick of the file system's clock.
Fingerprint = tuple[tuple[Path, int, int, int], ...]


class State(enum.Enum):
    """The loading state of a model."""

    UNLOADED = "unloaded"
    LOADING = "loading"
    SERVING = "serving"
    FAILED = "failed"


class Entry:
    """One model by its name: its serving version, its source and its loading state.

    The thread that loads replaces `models` as a whole; requests keep the version that they started with.
    """

    def __init__(self, name: str, settings: ModelSettings, spec: ModelSpec | None = None) -> None:
        self.name = name
        self.settings = settings
        self.models: Version = ()  # one per device; empty: not loaded
        self.loaded_from: Fingerprint = ()  # fingerprint of the files, taken before they were last read
        self.failure = ""  # why the last attempt to load it failed
        self.n_failed = 0  # failed attempts to load it
        self.failed_s = 0.0  # when the last attempt failed
        self.loading: Future[None] | None = None  # the last attempt of a first load
        self.reloading: Future[None] | None = None  # the last reload, shared by all who request one before it starts
        self._spec = spec  # the spec of a module passed in by the caller
        self.turn = threading.Lock()  # one load at a time per model; a factory that hangs blocks no other model

    @property
    def state(self) -> State:
        if self.models:
            return State.SERVING
        if self.is_loading:
            return State.LOADING
        return State.FAILED if self.failure else State.UNLOADED

    @property
    def is_loading(self) -> bool:
        """Whether the first load is waiting or running."""
        return self.loading is not None and not self.loading.done()

    @property
    def has_source(self) -> bool:
        """Whether the model can be reloaded."""
        return self._spec is None

    def files(self) -> tuple[Path, ...]:
        """Return the files whose change triggers a reload."""
        if not self.has_source:
            return ()
        labels = (self.settings.class_names,) if self.settings.class_names else ()
        return (*sources.files(self.settings.model, self.settings.weights), *labels)

    def fingerprint(self) -> Fingerprint:
        return tuple((path, *_stat(path)) for path in self.files())

    def spec(self) -> ModelSpec:
        """Return the completed spec, newly loaded if there is a source. Raises `ConfigurationError`."""
        spec = self._spec or sources.load(self.settings.model, self.settings.weights)
        return spec.completed(self.settings.traits())


def _stat(path: Path) -> tuple[int, int, int]:
    try:
        found = path.stat()
    except OSError:
        return -1, -1, -1
    return found.st_ino, found.st_size, found.st_mtime_ns
