"""Configuration: the schema, its loading from files and flags, the numbers derived from it, and the recipes."""

from .compare import changed_settings
from .defaults import defaults
from .derive import Derived, derive
from .load import Override, dump_config, flatten, load_config, parse_opts

__all__ = [
    "Derived",
    "Override",
    "changed_settings",
    "defaults",
    "derive",
    "dump_config",
    "flatten",
    "load_config",
    "parse_opts",
]
