"""Nodes that say what to avoid."""

from comfy_api.latest import io

from .bridge import check_conditioning
from .inputs import CONCEPTS, concepts_from, preset_input, settings_inputs


class DNGConcept(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DNGConcept",
            display_name="DNG Concept",
            category="DNG",
            description="One more thing to avoid, with settings of its own, for `more_concepts` of the DNG samplers, "
            "guider and patch. Chain several through `previous`.",
            search_aliases=["dynamic negative guidance", "dng", "negative prompt", "avoid", "several", "multiple"],
            inputs=[
                io.Conditioning.Input("negative", tooltip="What the images should not show."),
                *settings_inputs(),
                CONCEPTS.Input("previous", optional=True, tooltip="Concepts that this one is added to."),
                preset_input(),
            ],
            outputs=[
                CONCEPTS.Output(display_name="concepts", tooltip="For `more_concepts`, or the next DNG Concept.")
            ],
        )

    @classmethod
    def execute(cls, negative, previous=None, **values) -> io.NodeOutput:
        check_conditioning(negative, "negative")
        return io.NodeOutput((*(previous or ()), *concepts_from(negative, values)))


NODES = [DNGConcept]
