"""A row of the tables LOSSES, ADVANTAGES and CORRECTIONS."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Row(NamedTuple):
    """A pure function `(inputs, config)` and the dataclass of its knobs."""

    function: Callable[[Any, Any], Any]
    config: type[Any]

    def bind(self, arguments: Mapping[str, Any]) -> Callable[[Any], Any]:
        """The function of inputs alone, with these knobs (the rest at their defaults)."""
        config = self.config(**arguments)
        return lambda inputs: self.function(inputs, config)
