"""Nodes that say what to avoid."""

from comfy_api.latest import io

from .inputs import CONCEPTS, concepts_from, preset_input, rule_input, settings_inputs
from .run.checks import check_conditioning


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
                rule_input(),
            ],
            outputs=[
                CONCEPTS.Output(display_name="concepts", tooltip="For `more_concepts`, or the next DNG Concept.")
            ],
        )

    @classmethod
    def execute(cls, negative, previous=None, **values) -> io.NodeOutput:
        check_conditioning(negative, "negative")
        return io.NodeOutput((*(previous or ()), *concepts_from(negative, values)))


class JointNegative(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DNGJointNegative",
            display_name="Joint Negative (DNG)",
            category="DNG",
            description="Encodes a prompt, and what to avoid together with it (positive, undesired), as `reference` "
            "positive needs it: what is avoided is then the undesired thing in such an image, not everywhere.",
            search_aliases=["dynamic negative guidance", "dng", "clip text encode", "negative prompt", "joint"],
            inputs=[
                io.Clip.Input("clip", tooltip="The CLIP model that belongs to the model."),
                io.String.Input(
                    "positive_text", multiline=True, dynamic_prompts=True, tooltip="What the image should show."
                ),
                io.String.Input(
                    "undesired_text", multiline=True, dynamic_prompts=True, tooltip="What it should not show."
                ),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive", tooltip="The prompt alone."),
                io.Conditioning.Output(
                    display_name="negative", tooltip="The prompt and the undesired thing, as one text: what to avoid."
                ),
            ],
        )

    @classmethod
    def execute(cls, clip, positive_text, undesired_text) -> io.NodeOutput:
        if not undesired_text.strip():
            raise ValueError("`undesired_text` is empty, so there is nothing to avoid; say what should not appear")
        joint = ", ".join(text.strip().rstrip(",") for text in (positive_text, undesired_text) if text.strip())
        return io.NodeOutput(*(clip.encode_from_tokens_scheduled(clip.tokenize(t)) for t in (positive_text, joint)))


NODES = [DNGConcept, JointNegative]
