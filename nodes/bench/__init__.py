"""Nodes that only `dng bench comfyui` and `dng figures economy` load.

They count predictions, run a sampler once for each of many seeds, and make networks of known shapes at random.
"""

from typing import Any


async def comfy_entrypoint() -> Any:
    """The nodes as ComfyUI loads them. Imported lazily, as those of the pack are."""
    from comfy_api.latest import ComfyExtension

    from .nodes import NODES

    class BenchExtension(ComfyExtension):
        async def get_node_list(self) -> list[Any]:
            return list(NODES)

    return BenchExtension()
