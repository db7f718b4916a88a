"""Networks in the layouts of others."""

from .layouts import class_only_state, public_unet  # noqa: F401
