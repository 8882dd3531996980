"""Configuration: the schema, its loading from files and flags, and the recipes."""

from .compare import changed_settings
from .defaults import defaults
from .load import Override, flatten, load_config, parse_opts

__all__ = [
    "Override",
    "changed_settings",
    "defaults",
    "flatten",
    "load_config",
    "parse_opts",
]
