"""Nodes that say what to avoid."""

from comfy_api.latest import io
from nodes import CLIPTextEncode

from .inputs import CONCEPTS, concept_choices, concepts_from, settings_input
from .run.checks import check_conditioning
from .run.concept import JOINT


class DNGConcept(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DNGConcept",
            display_name="DNG Concept",
            category=CLIPTextEncode.CATEGORY,
            description="One more thing to avoid, with settings of its own. Connect it to `more_concepts` of a DNG "
            "sampler, guider or patch. Several of these nodes can be chained through `previous`.",
            search_aliases=["dynamic negative guidance", "dng", "negative prompt", "avoid", "several", "multiple"],
            inputs=[
                io.Conditioning.Input("negative", tooltip="What the images should not show."),
                settings_input(concept_choices()),
                CONCEPTS.Input("previous", optional=True, tooltip="The concepts to which this one is added."),
            ],
            accept_all_inputs=True,
            outputs=[
                CONCEPTS.Output(
                    display_name="concepts", tooltip="Connect this to `more_concepts`, or to the next DNG Concept."
                )
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
            category=CLIPTextEncode.CATEGORY,
            description="Encodes a prompt, and encodes the same prompt together with what is to be avoided. This is "
            "the right `negative` for text-to-image models: DNG compares it with the prompt, and avoids the undesired "
            "thing in images of this prompt.",
            search_aliases=["dynamic negative guidance", "dng", "clip text encode", "negative prompt", "joint"],
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder that belongs to the model."),
                io.String.Input(
                    "positive_text", multiline=True, dynamic_prompts=True, tooltip="What the image should show."
                ),
                io.String.Input(
                    "undesired_text", multiline=True, dynamic_prompts=True, tooltip="What the image should not show."
                ),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive", tooltip="The prompt alone."),
                io.Conditioning.Output(
                    display_name="negative",
                    tooltip="The prompt and the undesired thing, encoded as one text. This is what to avoid.",
                ),
            ],
        )

    @classmethod
    def execute(cls, clip, positive_text, undesired_text) -> io.NodeOutput:
        if clip is None:
            raise ValueError("`clip` is empty: the checkpoint holds no text encoder; load one with a CLIP loader node")
        if not undesired_text.strip():
            raise ValueError("`undesired_text` is empty, so there is nothing to avoid; say what should not appear")
        joint = ", ".join(text.strip().rstrip(",") for text in (positive_text, undesired_text) if text.strip())
        positive = clip.encode_from_tokens_scheduled(clip.tokenize(positive_text))
        negative = clip.encode_from_tokens_scheduled(clip.tokenize(joint), add_dict={JOINT: True})
        return io.NodeOutput(positive, negative)


NODES = [DNGConcept, JointNegative]
