"""Layers that can be explained, and the layout of their outputs."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from ...errors import ConfigurationError, InvalidArgument, NotFound, did_you_mean

MANY_LAYERS = 8  # layers that an error message lists

Size = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Layout:
    """The layout of a layer's output: [n, c, h, w], [n, h, w, c] or tokens [n, T, c]."""

    kind: Literal["nchw", "nhwc", "tokens"]
    prefix: int = 0  # tokens before the grid, such as a class token
    suffix: int = 0  # tokens after the grid
    grid: Size | None = None  # h and w; None: derived from the input's aspect ratio
    input_size: Size | None = None  # H and W that the grid belongs to; None: any

    def __str__(self) -> str:
        if self.kind != "tokens":
            return self.kind
        return f"tokens:{self.prefix}" + (f":{self.grid[0]}x{self.grid[1]}" if self.grid else "")

    def arrange(self, values: Tensor, input_size: Size) -> Tensor:
        """Return a layer's output or gradient as [n, c, h, w]. Raises `InvalidArgument` if the layout does not fit."""
        if values.ndim != (3 if self.kind == "tokens" else 4):
            raise InvalidArgument(f"method.layer: it returns {list(values.shape)}, which is not {self}")
        if self.kind == "nchw":
            return values
        if self.kind == "nhwc":
            return values.permute(0, 3, 1, 2)
        height, width = self._grid(values.shape[1], input_size)
        tokens = values[:, self.prefix : self.prefix + height * width]  # [n, h × w, c]
        return tokens.transpose(1, 2).reshape(len(values), -1, height, width)

    def _grid(self, n_tokens: int, input_size: Size) -> Size:
        """Return h and w of the token grid for an input of this size."""
        n_positions = n_tokens - self.prefix - self.suffix
        if self.grid and self.input_size in (None, input_size):
            fitting = [self.grid] if math.prod(self.grid) == n_positions else []
        elif self.grid and self.input_size:  # another input size with the same patch size
            sides = [side * now / then for side, now, then in zip(self.grid, input_size, self.input_size, strict=True)]
            around = [(math.floor(side), math.ceil(side)) for side in sides]
            fitting = list({(h, w) for h in around[0] for w in around[1] if h * w == n_positions})
        else:
            fitting = list(grids(n_positions, input_size))
        if len(fitting) != 1:
            raise InvalidArgument(
                f"method.layer: it returns {n_tokens} tokens for an input of {list(input_size)}, which is not {self}"
            )
        return fitting[0]


def layout(text: str) -> Layout:
    """Parse a layout: nchw, nhwc, tokens:1 or tokens:1:14x14. Raises `ConfigurationError`."""
    if text in ("nchw", "nhwc"):
        return Layout("nchw" if text == "nchw" else "nhwc")
    found = re.fullmatch(r"tokens:(\d{1,6})(?::(\d{1,6})x(\d{1,6}))?", text)
    if not found or "0" in (found[2], found[3]):
        raise ConfigurationError(
            f'layer_layout: got "{text}", expected "nchw", "nhwc", or "tokens:P:HxW": P tokens before a grid of H × W'
        )
    return Layout("tokens", int(found[1]), grid=(int(found[2]), int(found[3])) if found[2] else None)


@dataclass(frozen=True, slots=True)
class Layers:
    """The layers of a module by name, in the order in which they finish in a pass."""

    layouts: Mapping[str, Layout] = field(default_factory=dict)  # layers that can be explained
    default: str = ""  # the layer to use if none is named; empty: there is none
    unfit: Mapping[str, str] = field(default_factory=dict)  # why other layers cannot be explained

    def choose(self, name: str, known: Sequence[str]) -> str:
        """Return the layer of this name; empty is the default.

        Raises `InvalidArgument` for a layer that cannot be explained and `NotFound` for an unknown one; both list
        layers that can.
        """
        if name in self.layouts:
            return name
        if name in self.unfit:
            raise InvalidArgument(f'method.layer: "{name}" {self.unfit[name]}; {self._others()}')
        if name and name in known:
            raise InvalidArgument(f'method.layer: "{name}" does not run in a pass by itself; {self._others()}')
        if name:
            last_first = [*self.layouts][::-1]  # lists the last layers first: they are the useful ones
            raise NotFound(f'method.layer: there is no "{name}"; {did_you_mean(name, last_first or known)}')
        if not self.default:
            raise NotFound(f"method.layer: got none, and the model has no default layer; {self._others()}")
        return self.default

    def _others(self) -> str:
        if not self.layouts:
            return "no layer qualifies; its operator can set layer_layout"
        names = [f'"{name}"' for name in self.layouts][-MANY_LAYERS:]
        return f"name one of {', '.join(names)}" + (", …" if len(self.layouts) > MANY_LAYERS else "")


def grids(n: int, size: Size) -> Iterator[Size]:
    """Yield h and w of n positions with the aspect ratio of the input."""
    height, width = size
    near_h = round(math.sqrt(max(0, n) * height / width))
    for h in range(max(1, near_h - 1), near_h + 2):
        w = n // h
        if h * w == n and n > 1 and abs(w - h * width / height) < 1 and abs(h - w * height / width) < 1:
            yield h, w


def first_tensor(returned: object) -> Tensor | None:
    """Return a layer's output tensor: the return value itself or its first item; None if that is no tensor."""
    if type(returned) in (tuple, list) and returned:
        returned = returned[0]  # type: ignore[index]
    return returned if isinstance(returned, Tensor) else None


def with_first_tensor(returned: Any, value: Tensor) -> Any:
    """Return a layer's return value with its first tensor replaced."""
    return value if isinstance(returned, Tensor) else type(returned)((value, *returned[1:]))
