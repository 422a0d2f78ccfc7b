"""A function as text: what torch.fx writes, copied, pickled and called."""

import importlib
import types
from dataclasses import dataclass
from typing import Any


class Code:
    """A forward method as text, with what its names mean; it is pickled and copied as such."""

    def __init__(self, text: str, names: dict[str, Any]):
        """Compile the text; `names` are its globals: modules, functions, classes."""
        self.text, self.names = text, names
        scope = dict(names)
        exec(compile(text, f"<fullres segments {id(self)}>", "exec"), scope)
        self.function = scope["forward"]

    def __call__(self, *args: Any) -> Any:
        """Return what the method does without a `self`."""
        return self.function(None, *args)

    def __reduce__(self) -> tuple:
        """Return it as text and names, modules by theirs."""
        names = {
            name: _Named(value.__name__) if isinstance(value, types.ModuleType) else value
            for name, value in self.names.items()
        }
        return _restored, (self.text, names)

    def __deepcopy__(self, memo: dict) -> "Code":
        """Return itself: nothing of it changes."""
        return self


@dataclass(frozen=True)
class _Named:
    module: str


def _restored(text: str, names: dict[str, Any]) -> Code:
    return Code(
        text,
        {
            name: importlib.import_module(value.module) if isinstance(value, _Named) else value
            for name, value in names.items()
        },
    )
