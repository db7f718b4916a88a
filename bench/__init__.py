"""Nodes that only `dng bench comfyui` loads: they count predictions, and make networks of known shapes at random."""


async def comfy_entrypoint():
    """The nodes as ComfyUI loads them. Imported lazily, as those of the pack are."""
    from comfy_api.latest import ComfyExtension

    from .nodes import NODES

    class BenchExtension(ComfyExtension):
        async def get_node_list(self):
            return NODES

    return BenchExtension()
