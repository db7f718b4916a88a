"""Dynamic Negative Guidance for ComfyUI: what ComfyUI loads."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """The pack's extension. Imported lazily, so that this module can be collected by tools outside ComfyUI."""
    from comfy_api.latest import ComfyExtension

    from .nodes import NODES

    class DNGExtension(ComfyExtension):
        async def get_node_list(self):
            return NODES

    return DNGExtension()
