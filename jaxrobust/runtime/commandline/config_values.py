"""Values of a config that may be one or several."""

from typing import Any

from ml_collections import config_dict


class OneOrSeveral(config_dict.FieldReference):
    """A value of the type of its default, or a list or tuple of such."""

    def set(self, value: Any, type_safe: bool = True) -> None:
        """Put one value, or a tuple of several, in place of the one before."""
        if not isinstance(value, list | tuple):
            super().set(value, type_safe)
            return
        own = self.get_type()
        parts = tuple(own(v) if own is float and isinstance(v, int) else v for v in value)
        if type_safe and not all(isinstance(part, own) for part in parts):
            raise TypeError(f"of {value!r} each part must be of type {own.__name__}")
        super().set(parts, False)

    @classmethod
    def unset(cls, kind: type) -> "OneOrSeveral":
        """Make one that is None, and of this type where it is set."""
        return cls(None, field_type=kind)
