"""Dynamic Negative Guidance: the mathematics, the study of class removal and the headless runner, without ComfyUI.

Importing this package imports nothing else; take what is needed from its modules.
"""

__version__ = "0.1.0"
