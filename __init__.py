"""Dynamic Negative Guidance for ComfyUI: what ComfyUI loads."""

import re

WEB_DIRECTORY = "./web"
OLDEST_COMFYUI = "0.16.3"  # the oldest release that the tests are run with


async def comfy_entrypoint():
    """The pack's extension. Imported lazily, so that this module can be collected by tools outside ComfyUI.

    Raises RuntimeError, which ComfyUI logs in one line, where ComfyUI is older than ``OLDEST_COMFYUI``.
    """
    from comfyui_version import __version__ as version

    if numbers(version) < numbers(OLDEST_COMFYUI):
        raise RuntimeError(
            f"Dynamic Negative Guidance needs ComfyUI {OLDEST_COMFYUI} or newer, and this is ComfyUI {version}: "
            "update ComfyUI, then restart it"
        )
    from comfy_api.latest import ComfyExtension

    from .nodes import NODES

    class DNGExtension(ComfyExtension):
        async def get_node_list(self):
            return NODES

    return DNGExtension()


def numbers(version: str) -> tuple[int, ...]:
    """The three numbers of a version, which compare as versions do."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])
