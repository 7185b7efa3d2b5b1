"""Class names: resolves a label or an index from a request to a class index."""

from pathlib import Path

from ..domain import Choice
from ..errors import ConfigurationError, InvalidArgument, NotFound, did_you_mean


class ClassNames:
    """The labels of a model's classes, in order; several classes may have the same label."""

    def __init__(self, model: str, labels: tuple[str, ...]) -> None:
        self._model = model
        self._labels = labels
        self._indices: dict[str, list[int]] = {}
        for index, label in enumerate(labels):
            self._indices.setdefault(label, []).append(index)

    def check(self, n_classes: int, *, file: Path | None) -> None:
        """Raise `ConfigurationError` if the model has labels, but not one for each class. `file` has the labels."""
        if self._labels and len(self._labels) != n_classes:
            where = f"{file}: " if file else ""
            raise ConfigurationError(
                f'class_names: {where}got {len(self._labels)}, model "{self._model}" has {n_classes} classes'
            )

    def index(self, choice: Choice, *, n_classes: int) -> int:
        """Return a class index. Raises `NotFound` for an unknown label, `InvalidArgument` for an index out of range.

        `n_classes` is 0 if the model has not run yet.
        """
        if isinstance(choice, str):
            return self._find_label(choice)
        if choice < 0 or (n_classes and choice >= n_classes):
            bound = str(n_classes - 1) if n_classes else "the last class"
            raise InvalidArgument(f'target: class index {choice}, model "{self._model}" has 0 to {bound}')
        return choice

    def _find_label(self, label: str) -> int:
        named = self._indices.get(label)
        if named is None:
            raise NotFound(f'target: model "{self._model}" has no label "{label}"; {did_you_mean(label, self._labels)}')
        if len(named) > 1:
            classes = ", ".join(map(str, named))
            raise InvalidArgument(f'target: label "{label}" names the classes {classes}; give one of these indices')
        return named[0]
